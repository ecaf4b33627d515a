"""Whether a tensor holds numbers only, without a copy of it where it does."""

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """False for NaN or infinity anywhere. Their sum is none of a number either, and takes no memory; only a sum that overflows needs a look
    at each of them.
    """
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())
