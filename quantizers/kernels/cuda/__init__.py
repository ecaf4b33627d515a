"""Kernels in Triton for NVIDIA devices. Importing this package imports no Triton; its other modules do, and are imported when first run.

The same source runs on tensors of the CPU where TRITON_INTERPRET=1 is set before Triton is imported: slowly, for the tests.
"""

import importlib.util

import torch

_CAPABILITY = (8, 0)  # Ampere: the first with bf16 and int8 products of 16 x 8 x 16 and more, for which the tiles are made


def why_not(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, None where they can."""
    if device.type != "cuda":
        return f"they need a CUDA device, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install the CUDA build of torch, which brings it"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_CAPABILITY[0]}.{_CAPABILITY[1]}"
    return None
