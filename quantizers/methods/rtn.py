"""Round to nearest: the scale of a group from its largest magnitude (absmax) or its range (zero point), every weight to the nearest code.

The conventions of scales and zero points are `quantizers.grid`'s, those of float formats `quantizers.minifloat`'s.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.base import Method
from quantizers.scheme import IntegerScheme, LayerScheme, MinifloatScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.weights import QuantizedWeight


class Rtn(Method):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    summary: ClassVar[str] = "Round every weight to the nearest code; no data, seconds."

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme | MinifloatScheme):
            raise UnsupportedScheme(
                f"rtn makes integer formats such as w8, w4g64, w4g64a8 or w8a8, and fp8, mxfp4 and nvfp4, not {scheme.slug}", param="model"
            )

    def apply(self, block: "Block") -> None:
        for name, scheme in block.schemes.items():
            weight = block.linears[name].weight.detach()
            if isinstance(scheme, MinifloatScheme):
                block.put(name, quantize_minifloat(weight, scheme, layer=name))
            else:
                assert isinstance(scheme, IntegerScheme), "checked by the recipe"
                block.put(name, quantize_nearest(weight, scheme, layer=name))


def quantize_nearest(weight: "Tensor", scheme: IntegerScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` where it cannot be."""
    from quantizers.grid import as_groups, nearest_codes, range_grid

    grouped = as_groups(weight, scheme, layer)
    grid = range_grid(grouped, scheme, layer)
    return grid.weight(nearest_codes(grouped, grid).view(weight.shape))


def quantize_minifloat(weight: "Tensor", scheme: MinifloatScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` where it cannot be."""
    from quantizers.finite import all_finite
    from quantizers.grid import check_groups_fit
    from quantizers.minifloat import encode
    from quantizers.weights import QuantizedWeight

    rows, columns = weight.shape
    check_groups_fit(scheme, columns, layer)
    if not all_finite(weight):
        raise QuantizationFailed("its weights hold NaN or infinity: the checkpoint is damaged", layer=layer)
    return QuantizedWeight(scheme, rows, columns, encode(weight.float().contiguous(), scheme.format))
