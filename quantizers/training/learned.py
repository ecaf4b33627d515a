"""Weights that are quantized in every forward pass, and learn through it: scale, zero and the weights themselves.

Rounding has the gradient of the identity (straight through, Bengio et al. 2013, arXiv 1308.3432); the clamp has its own, so a weight
beyond the range of the codes gets no gradient, and the scale and the zero get one from both sides (Esser et al. 2020, arXiv 1902.08153;
EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.2).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantizers.block import executed_tokens
from quantizers.grid import Grid, as_groups, learned_grid
from quantizers.scheme import IntegerScheme
from quantizers.training.product import product
from quantizers.weights import QuantizedWeight

SMALLEST_SCALE = 2.0**-24  # fp16's smallest number: a scale stays positive in training, and one that is stored


def round_through(x: Tensor) -> Tensor:
    """Nearest integers, with the gradient of the identity."""
    return x + (x.round() - x).detach()


class Computes(Protocol):
    """A weight [out, in] of a layer, and the format that says whether the layer's input is rounded too."""

    @property
    def scheme(self) -> IntegerScheme: ...

    def __call__(self) -> Tensor: ...


def forward_with(weight: Computes, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward pass of `layer` with `weight` instead of its own; int8 tokens are rounded straight through. What learns computes in a
    quick type, what is only measured in fp32.
    """
    bias = layer._parameters.get("bias")

    def forward(x: Tensor) -> Tensor:
        if weight.scheme.activation_bits:
            x = x + (executed_tokens(x.detach()) - x).detach()
        if not torch.is_grad_enabled():
            return linear(x, weight(), bias)
        result = product(x, weight())
        return result if bias is None else result + bias

    return forward


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile `module` runs `forward`."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def computing_with(layers: Mapping[str, nn.Module], weights: Mapping[str, Computes]) -> Iterator[None]:
    """Meanwhile the `layers` that have a weight in `weights` compute with it."""
    with ExitStack() as stack:
        for name, weight in weights.items():
            stack.enter_context(running(layers[name], forward_with(weight, layers[name])))
        yield


class Rounded:
    """A layer's weight as it is when nothing learns any more."""

    def __init__(self, weight: QuantizedWeight) -> None:
        assert isinstance(weight.scheme, IntegerScheme), "training makes integer formats"
        self.scheme, self._values = weight.scheme, weight.dequantize()

    def __call__(self) -> Tensor:
        return self._values


class LearnedWeight:
    """One layer's weight on a grid that learns too.

    weight: fp32 leaf [out, G, group]. scale: fp32 leaf [out, G, 1]. zero: fp32 leaf of that shape: in codes where the format has integer
    zero points, in weights where it has minimums; None where it is symmetric.
    """

    def __init__(self, weight: Tensor, grid: Grid, layer: str) -> None:
        """Begins at `weight` [out, in] on `grid`; neither is changed."""
        self.scheme, self._layer = grid.scheme, layer
        self.weight = as_groups(weight.detach().clone(), grid.scheme, layer).requires_grad_()
        self.scale = grid.scale.float().unsqueeze(-1).requires_grad_()
        zero = grid.zero_point if grid.zero_point is not None else grid.minimum
        self.zero = None if zero is None else zero.float().unsqueeze(-1).requires_grad_()

    def __call__(self) -> Tensor:
        """fp32 [out, in]: what the codes of the weight as it is now stand for."""
        return fake_quantize(self.weight, self.scale, self.zero, self.scheme).flatten(1)

    def leaves(self) -> dict[str, Tensor]:
        """All that can be trained, by name."""
        return {"weight": self.weight, "scale": self.scale} | ({} if self.zero is None else {"zero": self.zero})

    def quantized(self) -> QuantizedWeight:
        """Rounded for good, scales to fp16 and zeros as the format stores them. Raises QuantizationFailed naming the layer."""
        zero = None if self.zero is None else self.zero.detach().squeeze(-1)
        grid = learned_grid(self.scale.detach().squeeze(-1), zero, self.scheme, self._layer)
        return grid.weight(grid.codes(self.weight.detach()).flatten(1))


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: IntegerScheme) -> Tensor:
    """`weight` [out, G, group] to the grid and back; `scale` and `zero` [out, G, 1]."""
    if scheme.zero == "minimum":
        assert zero is not None
        return round_through((weight - zero) / scale).clamp(0, scheme.qmax) * scale + zero
    if scheme.zero == "integer":
        assert zero is not None
        whole = round_through(zero).clamp(0, scheme.qmax)
        return ((round_through(weight / scale) + whole).clamp(0, scheme.qmax) - whole) * scale
    return round_through(weight / scale).clamp(scheme.qmin, scheme.qmax) * scale
