"""Round to nearest: the scale of a group from its largest magnitude (absmax) or its range (zero point), every weight to the nearest code.

The conventions are compressed-tensors' (`calculate_qparams`): 0 always lies in the range of `none` and `integer`, a symmetric scale is
max|w| / ((2^b - 1) / 2), a zero point is an integer in the range of the codes. `minimum` takes the range as it is. Scales and minimums
are rounded to fp16 before the codes are chosen, so that the codes are the nearest ones for the numbers that are stored.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.base import Method
from quantizers.scheme import GROUP_SIZES, BnbScheme, FloatScheme, IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.pipeline import Block
    from quantizers.weights import QuantizedWeight

_SMALLEST_FP16 = 2.0**-24


class Rtn(Method):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    summary: ClassVar[str] = "Round every weight to the nearest code; no data, seconds."

    def check(self, scheme: FloatScheme | IntegerScheme | BnbScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"rtn makes integer formats such as w8, w4g64 or w8a8, not {scheme.slug}", param="model")
        if scheme.activation_bits and scheme.slug != "w8a8":
            raise UnsupportedScheme(
                f"rtn quantizes activations only as w8a8, not {scheme.slug}: leave 'a8' out or choose w8a8", param="model"
            )

    def apply(self, block: "Block") -> None:
        assert isinstance(block.scheme, IntegerScheme), "checked by the recipe"
        for name, linear in block.linears.items():
            block.put(name, quantize_nearest(linear.weight.detach(), block.scheme, layer=name))


def quantize_nearest(weight: "Tensor", scheme: IntegerScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` where it cannot be."""
    import torch

    from quantizers.packing import pack
    from quantizers.weights import QuantizedWeight, fits, is_plain_int8

    out_features, in_features = weight.shape
    if not fits(scheme, in_features):
        choices = [f"g{size}" for size in GROUP_SIZES if in_features % size == 0]
        raise QuantizationFailed(
            f"its {in_features} inputs are not a multiple of the group size {scheme.group_size}: "
            f"choose {', '.join([*choices, 'no group (per channel)'])}",
            layer=layer,
        )
    if not bool(torch.isfinite(weight).all()):
        raise QuantizationFailed("its weights hold NaN or infinity: the checkpoint is damaged", layer=layer)
    grouped = weight.float().view(out_features, -1, scheme.group_size or in_features)
    codes, tensors = _with_minimum(grouped, scheme, layer) if scheme.zero == "minimum" else _with_zero_in_range(grouped, scheme, layer)
    codes = codes.view(out_features, in_features)
    if is_plain_int8(scheme):
        tensors["codes"] = codes.to(torch.int8)
    else:
        tensors["codes"] = pack((codes - scheme.qmin).to(torch.uint8), scheme.weight_bits)
    return QuantizedWeight(scheme, out_features, in_features, tensors)


def _with_zero_in_range(grouped: "Tensor", scheme: IntegerScheme, layer: str) -> tuple["Tensor", dict[str, "Tensor"]]:
    """`grouped` fp32 [out, G, group] -> codes of that shape (fp32 integers), scales, and zero points where the scheme has them."""
    import torch

    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if scheme.symmetric:
        exact = torch.maximum(-low, high) / ((scheme.qmax - scheme.qmin) / 2)
    else:
        exact = (high - low) / (scheme.qmax - scheme.qmin)
    scale = _to_fp16(exact, layer)
    scaled = grouped / scale.float().unsqueeze(-1)
    tensors = {"scale": scale}
    if not scheme.symmetric:
        nonzero = exact.clamp(min=torch.finfo(torch.float32).tiny)  # a group of zeros has no range: its zero point is 0
        zero_point = (-low / nonzero).clamp(scheme.qmin, scheme.qmax).round()
        scaled = scaled + zero_point.unsqueeze(-1)
        tensors["zero_point"] = zero_point.to(torch.uint8)
    return scaled.clamp(scheme.qmin, scheme.qmax).round(), tensors


def _with_minimum(grouped: "Tensor", scheme: IntegerScheme, layer: str) -> tuple["Tensor", dict[str, "Tensor"]]:
    """`grouped` fp32 [out, G, group] -> codes of the same shape (fp32 integers), scales and minimums: the grid of GGUF's Q4_1."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, minimum = _to_fp16((high - low) / scheme.qmax, layer), _finite_fp16(low, layer)
    scaled = (grouped - minimum.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    return scaled.round().clamp(0, scheme.qmax), {"scale": scale, "minimum": minimum}


def _to_fp16(scale: "Tensor", layer: str) -> "Tensor":
    """A scale that fp16 would round to zero becomes its smallest positive number, so that nothing is divided by zero."""
    return _finite_fp16(scale, layer).clamp(min=_SMALLEST_FP16)


def _finite_fp16(values: "Tensor", layer: str) -> "Tensor":
    import torch

    rounded = values.half()
    if not bool(torch.isfinite(rounded).all()):
        raise QuantizationFailed(
            f"a group's scale or minimum of magnitude {values.abs().max().item():.4g} is beyond fp16 (65504): "
            "use a baseline or a bnb format",
            layer=layer,
        )
    return rounded
