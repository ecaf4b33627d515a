"""Round to nearest: the scale of a group from its largest magnitude (absmax) or its range (zero point), every weight to the nearest code.

The conventions of scales and zero points are `quantizers.grid`'s.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import Method
from quantizers.scheme import BnbScheme, FloatScheme, IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.weights import QuantizedWeight


class Rtn(Method):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    summary: ClassVar[str] = "Round every weight to the nearest code; no data, seconds."

    def check(self, scheme: FloatScheme | IntegerScheme | BnbScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"rtn makes integer formats such as w8, w4g64, w4g64a8 or w8a8, not {scheme.slug}", param="model")

    def apply(self, block: "Block") -> None:
        for name, scheme in block.schemes.items():
            assert isinstance(scheme, IntegerScheme), "checked by the recipe"
            block.put(name, quantize_nearest(block.linears[name].weight.detach(), scheme, layer=name))


def quantize_nearest(weight: "Tensor", scheme: IntegerScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` where it cannot be."""
    from quantizers.grid import as_groups, range_grid

    grouped = as_groups(weight, scheme, layer)
    grid = range_grid(grouped, scheme, layer)
    return grid.weight(grid.codes(grouped).view(weight.shape))
