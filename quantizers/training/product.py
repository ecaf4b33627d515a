"""Matrix products of training: factors rounded to a type that is quick on the machine, sums in fp32, results and gradients in fp32.

Only the products of quantized layers run so; what lies between them stays in fp32, and so do parameters and what the optimizer keeps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def quick_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it faster than fp32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., in] times `weight` [out, in] transposed: fp32 [..., out], with gradients to both."""
    result: Tensor = _Product.apply(x, weight, quick_dtype(x.device))  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        context.save_for_backward(x, weight)
        return linear(x, weight).float()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = context.saved_tensors
        gradient = gradient.to(x.dtype)
        wants_x, wants_weight, _ = context.needs_input_grad
        to_x = (gradient @ weight).float() if wants_x else None
        to_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float() if wants_weight else None
        return to_x, to_weight, None
