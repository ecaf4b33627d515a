"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 4): what makes activations hard to quantize moves into the weights.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for every input channel j of the layers that a normalization feeds; the normalization is
divided by s and the columns of the weights multiplied by it, so the block computes the same in floating point. As the last method of a
recipe it rounds to nearest; `smoothquant-gptq-w8a8` leaves that to GPTQ.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.base import Method, Stream
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.flow import Group

_SMALLEST = 1e-5  # the original's bound of maxima and scales
_TRIED = tuple(0.05 * step for step in range(4, 20))  # 0.2 to 0.95
_SEARCH_TOKENS = 1024  # on which candidates of alpha are tried, spread over all samples


class SmoothQuant(Method):
    """SmoothQuant.

    alpha: how much of the difficulty moves into the weights, 0 nothing, 1 all of it; `auto` finds it for every group of layers, as the
    one with the least error of their outputs.
    """

    name: Literal["smoothquant"] = "smoothquant"
    summary: ClassVar[str] = "Move outliers of the activations into the weights before another method quantizes both; calibration text."
    role: ClassVar[Literal["transform", "smoother", "quantizer"]] = "smoother"
    needs_calibration: ClassVar[bool] = True
    changes_unquantized: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | Literal["auto"] = 0.5

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full",))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme) or not scheme.activation_bits:
            raise UnsupportedScheme(f"smoothquant prepares 8-bit activations, and {scheme.slug} has none: use w8a8", param="model")

    def apply(self, block: "Block") -> None:
        import torch

        from quantizers.smoothing import move_scales

        seen: dict[Group, _Seen] = {}
        step = max(1, block.streams.token_count // _SEARCH_TOKENS)

        def see(group: "Group", x: "Tensor") -> None:
            if group.norm is None:
                return
            largest, tokens = x.abs().amax(0), x[::step].clone() if self.alpha == "auto" else None
            before = seen.get(group)
            if before is not None:
                largest = torch.maximum(largest, before.largest)
                tokens = None if before.tokens is None or tokens is None else torch.cat((before.tokens, tokens))
            seen[group] = _Seen(largest, tokens)

        block.watch(see)
        if not seen:
            raise QuantizationFailed("no normalization feeds a linear layer of this block: leave smoothquant out", layer=block.name)
        for group, statistics in seen.items():
            if block.members(group)[0]:
                move_scales(block, group, self._scales(block, group, statistics))

    def _scales(self, block: "Block", group: "Group", seen: "_Seen") -> "Tensor":
        import torch

        weights = [block.linears[name].weight for name in group.names]
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        if self.alpha != "auto":
            return smoothing_scales(seen.largest, largest, self.alpha)
        scheme = block.members(group)[1]
        assert isinstance(scheme, IntegerScheme) and seen.tokens is not None
        weight = torch.cat(weights)
        candidates = [smoothing_scales(seen.largest, largest, alpha) for alpha in _TRIED]
        errors = [_output_error(seen.tokens, weight, scales, scheme) for scales in candidates]
        return candidates[errors.index(min(errors))]


class _Seen:
    def __init__(self, largest: "Tensor", tokens: "Tensor | None") -> None:
        self.largest = largest  # fp32 [in], of each channel's magnitude
        self.tokens = tokens  # fp32 [some tokens, in], for a search


def smoothing_scales(activations: "Tensor", weights: "Tensor", alpha: float) -> "Tensor":
    """Equation 4: both fp32 [in], largest magnitudes by input channel -> factors of the weights' columns, fp32 [in]."""
    scales = activations.clamp(min=_SMALLEST).pow(alpha) / weights.clamp(min=_SMALLEST).pow(1 - alpha)
    return scales.clamp(min=_SMALLEST)


def _output_error(x: "Tensor", weight: "Tensor", scales: "Tensor", scheme: IntegerScheme) -> float:
    """Squared error of the group's outputs with smoothed, rounded weights and tokens. `weight` fp32 [out, in]."""
    from quantizers.block import executed_tokens
    from quantizers.grid import rounded

    quantized = rounded(weight * scales, scheme, "search")
    return float((executed_tokens(x / scales) @ quantized.T - x @ weight.T).square().sum())
