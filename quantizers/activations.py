"""Dynamic int8 activations: one symmetric scale a token, found from the token itself."""

import torch
from torch import Tensor

_LARGEST = 255 / 2  # half of the int8 range, as for weights: compressed-tensors' symmetric convention


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [tokens, in_features] -> int8 of that shape and fp32 [tokens, 1], x ~ codes * scale. A token of zeros gets codes of zero."""
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / _LARGEST
    # A scale of zero would divide by zero, and a subnormal one loses the quotient.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).round().clamp(-128, 127).to(torch.int8), scale
