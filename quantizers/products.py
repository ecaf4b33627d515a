"""Which library computes fp32 matrix products on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quick_products() -> Iterator[None]:
    """Meanwhile fp32 matrix products run in oneDNN instead of MKL, which on AMD's AVX-512 cores is half as fast.

    torch offers that choice only together with the permission to round the factors to bf16 (the sums stay fp32). oneDNN makes use of it
    where the CPU has bf16 matrix units (AMX); elsewhere the products are those of fp32. Calibration can bear it: its statistics are means
    over thousands of tokens.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
