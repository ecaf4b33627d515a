"""Round to nearest: the scale of a group from its largest magnitude (absmax) or its range (zero point), every weight to the nearest code."""

from typing import ClassVar, Literal

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import Method
from quantizers.scheme import BnbScheme, FloatScheme, IntegerScheme


class Rtn(Method):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    summary: ClassVar[str] = "Round every weight to the nearest code; no data, seconds."

    def check(self, scheme: FloatScheme | IntegerScheme | BnbScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"rtn makes integer formats such as w8, w4g64 or w8a8, not {scheme.slug}", param="model")
