"""Which library computes fp32 matrix products on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def in_onednn() -> bool:
    """Whether products run there meanwhile."""
    cpu = torch.cpu.get_capabilities()
    return cpu.get("architecture") == "x86_64" and not cpu.get("amx_bf16")


@contextmanager
def quick_products() -> Iterator[None]:
    """Meanwhile fp32 matrix products run in oneDNN instead of MKL, which on AMD's AVX-512 cores is half as fast.

    torch offers that choice only together with the permission to round the factors to bf16. oneDNN makes use of it where the CPU has
    matrix units for that (AMX, and some of ARM's), and three times as many products a second are not worth it: EfficientQAT at 3 bits
    then leaves twice the KL. There nothing is changed.
    """
    if not in_onednn():
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
