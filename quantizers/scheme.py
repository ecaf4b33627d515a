"""Number formats of a linear layer, as plain data: no torch here, so that every process can speak of them.

A scheme says how the numbers of one weight matrix `[out_features, in_features]` are stored and whether the layer's input is
quantized too. How numbers are chosen is a method's matter (`quantizers.methods`), how they are packed `quantizers.packing`'s.
"""

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantizers.errors import UnknownRecipe

WeightBits = Literal[2, 3, 4, 8]
GROUP_SIZES = (32, 64, 128)
SCALE_BITS = 16  # scales and minimums are fp16: 11 bits of significand, far below the step of the widest integer format
ZERO_POINT_BITS = 8  # one byte a group, whatever the width
BNB_BLOCK = 64  # weights that share an absmax
BNB_NESTED_BLOCK = 256  # absmax that share one, with double quantization
MXFP4_BLOCK = 32  # OCP Microscaling Formats v1.0, section 5.2
NVFP4_BLOCK = 16
OUTLIER_THRESHOLD = 6.0  # Dettmers et al. 2022, arXiv 2208.07339, section 3.2
MAX_OUTLIER_THRESHOLD = 1e4  # beyond it no activation of a working model lies, so it would be threshold 0 under another name
_ZERO_SLUGS = {"none": "", "integer": "z", "minimum": "m"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FloatScheme(_Frozen):
    """Unquantized weights in one floating type; the whole model runs in it."""

    kind: Literal["float"] = "float"
    dtype: Literal["fp32", "bf16", "fp16"]

    @property
    def slug(self) -> str:
        return self.dtype

    @property
    def weight_bits(self) -> int:
        return 32 if self.dtype == "fp32" else 16

    def bits_per_weight(self, in_features: int) -> float:  # noqa: ARG002  the same question is put to every scheme
        return float(self.weight_bits)


class IntegerScheme(_Frozen):
    """Integers with one scale for each group of `group_size` inputs of a row (the whole row where it is None).

    zero: `none`: w = scale * q, q signed, two's complement range [-2^(b-1), 2^(b-1)-1];
    `integer` (`z`): w = scale * (q - zero_point), q and zero_point in [0, 2^b-1];
    `minimum` (`m`): w = scale * q + minimum, q in [0, 2^b-1], minimum real (the grid of GGUF's Q4_1
    and of methods with a real zero point).
    activation_bits: 8 quantizes the input dynamically, symmetric, one scale a token.
    """

    kind: Literal["integer"] = "integer"
    weight_bits: WeightBits
    group_size: int | None = None
    zero: Literal["none", "integer", "minimum"] = "none"
    activation_bits: Literal[8] | None = None

    @model_validator(mode="after")
    def _group_is_known(self) -> "IntegerScheme":
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not one of {GROUP_SIZES}")
        return self

    @property
    def slug(self) -> str:
        group = "" if self.group_size is None else f"g{self.group_size}"
        zero = _ZERO_SLUGS[self.zero]
        activation = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"w{self.weight_bits}{group}{zero}{activation}"

    @property
    def symmetric(self) -> bool:
        return self.zero == "none"

    @property
    def qmin(self) -> int:
        return -(1 << (self.weight_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.weight_bits - 1)) - 1 if self.symmetric else (1 << self.weight_bits) - 1

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits a weight, scales and zero points included."""
        zero = {"none": 0, "integer": ZERO_POINT_BITS, "minimum": SCALE_BITS}[self.zero]
        return self.weight_bits + (SCALE_BITS + zero) / (self.group_size or in_features)


class BnbScheme(_Frozen):
    """A format of bitsandbytes: LLM.int8() (rows, outlier columns of the input apart) or 16 codes in blocks of 64 with fp32 absmax.

    outlier_threshold (int8 only): columns of the input with a magnitude of at least this are multiplied in floating point; 0: none are,
    which is naive int8. In a slug `int8t3.5`; `int8` alone has LLM.int8()'s own, 6.
    double_quant (nf4 and fp4 only, `dq`): the absmax of the blocks are themselves 8-bit codes, in blocks of 256 around their mean.
    """

    kind: Literal["bnb"] = "bnb"
    format: Literal["int8", "nf4", "fp4"]
    outlier_threshold: float = Field(default=OUTLIER_THRESHOLD, ge=0, le=MAX_OUTLIER_THRESHOLD, allow_inf_nan=False)
    double_quant: bool = False

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "BnbScheme":
        if self.format != "int8" and self.outlier_threshold != OUTLIER_THRESHOLD:
            raise ValueError(f"outlier_threshold belongs to int8; {self.format} quantizes weights only, so leave it out")
        if self.format == "int8" and self.double_quant:
            raise ValueError("double_quant belongs to nf4 and fp4; int8 has one absmax a row, so leave it out")
        return self

    @property
    def slug(self) -> str:
        threshold = "" if self.outlier_threshold == OUTLIER_THRESHOLD else f"t{Decimal(repr(self.outlier_threshold)).normalize():f}"
        return f"{self.format}{threshold}{'dq' if self.double_quant else ''}"

    @property
    def activation_bits(self) -> Literal[8] | None:
        """Of the inputs that are no outliers."""
        return 8 if self.format == "int8" else None

    @property
    def weight_bits(self) -> int:
        return 8 if self.format == "int8" else 4

    def bits_per_weight(self, in_features: int) -> float:
        if self.format == "int8":
            return 8 + 32 / in_features
        return 4 + (8 + 32 / BNB_NESTED_BLOCK if self.double_quant else 32) / BNB_BLOCK


class MinifloatScheme(_Frozen):
    """Floats of 8 or 4 bits. `fp8`: e4m3 with one fp32 scale a row, and the input in e4m3 with one scale a token.

    `mxfp4`: e2m1 in blocks of 32 that share a power of two (e8m0), as OCP MX v1.0 defines it. `nvfp4`: e2m1 in blocks of 16 with an e4m3
    scale each and one fp32 scale a matrix. Both leave the input alone. The bits are drawn in `quantizers.minifloat`.
    """

    kind: Literal["minifloat"] = "minifloat"
    format: Literal["fp8", "mxfp4", "nvfp4"]

    @property
    def slug(self) -> str:
        return self.format

    @property
    def weight_bits(self) -> int:
        return 8 if self.format == "fp8" else 4

    @property
    def group_size(self) -> int | None:
        return {"fp8": None, "mxfp4": MXFP4_BLOCK, "nvfp4": NVFP4_BLOCK}[self.format]

    @property
    def activation_bits(self) -> Literal[8] | None:
        return 8 if self.format == "fp8" else None

    def bits_per_weight(self, in_features: int) -> float:
        return self.weight_bits + (32 / in_features if self.group_size is None else 8 / self.group_size)


class MixedScheme(_Frozen):
    """Integers of a width that each group of layers is given by what it gains: `bits` stored bits a weight over all quantized layers.

    Group size and kind of zero point are the same everywhere, so that a budget buys widths. Which layer has which width is found while
    quantizing, and read back from the artifact's shapes.
    """

    kind: Literal["mixed"] = "mixed"
    bits: float = Field(gt=2, lt=9, allow_inf_nan=False)
    group_size: int
    zero: Literal["none", "integer", "minimum"] = "none"

    @model_validator(mode="after")
    def _budget_buys_something(self) -> "MixedScheme":
        narrowest, widest = (self.of(bits).bits_per_weight(self.group_size) for bits in (2, 8))
        if not narrowest <= self.bits <= widest:
            raise ValueError(
                f"a budget of {self.bits:g} bits a weight cannot be spent: "
                f"{self.of(2).slug} takes {narrowest:g}, {self.of(8).slug} {widest:g}"
            )
        return self

    def of(self, bits: int) -> IntegerScheme:
        """The format of a layer that was given `bits`."""
        return IntegerScheme(weight_bits=bits, group_size=self.group_size, zero=self.zero)

    @property
    def choices(self) -> tuple[IntegerScheme, ...]:
        """From the narrowest to the widest."""
        return tuple(self.of(bits) for bits in (2, 3, 4, 8))

    @property
    def slug(self) -> str:
        return f"mix{self.bits:g}g{self.group_size}{_ZERO_SLUGS[self.zero]}"

    @property
    def weight_bits(self) -> float:
        return self.bits

    def bits_per_weight(self, in_features: int) -> float:  # noqa: ARG002
        return self.bits


LayerScheme = FloatScheme | IntegerScheme | BnbScheme | MinifloatScheme  # what one layer can be in
Scheme = Annotated[LayerScheme | MixedScheme, Field(discriminator="kind")]

HEAD8 = IntegerScheme(weight_bits=8, group_size=32)  # the output matrix of a recipe with `-head8`
EMBED8 = HEAD8  # the token embedding of one with `-embed8`: a matrix that is both is held once

_INTEGER = re.compile(r"w(?P<bits>[2348])(?:g(?P<group>[0-9]{1,4}))?(?P<zero>[zm])?(?:a(?P<act>8))?")
_BNB = re.compile(r"(?P<int8>int8)(?:t(?P<threshold>[0-9]{1,5}(?:\.[0-9]{1,4})?))?|(?P<four>nf4|fp4)(?P<dq>dq)?")
_MIXED = re.compile(r"mix(?P<bits>[0-9](?:\.[0-9]{1,4})?)g(?P<group>[0-9]{1,4})(?P<zero>[zm])?")
_ZEROS = {slug or None: zero for zero, slug in _ZERO_SLUGS.items()}


def _bnb(slug: str, match: re.Match[str]) -> BnbScheme:
    if match["four"]:
        return BnbScheme(format=match["four"], double_quant=match["dq"] is not None)
    threshold = OUTLIER_THRESHOLD if match["threshold"] is None else float(match["threshold"])
    if threshold > MAX_OUTLIER_THRESHOLD:
        raise UnknownRecipe(f"{slug!r}: an outlier threshold is at most {MAX_OUTLIER_THRESHOLD:g}; int8t0 leaves outliers in int8")
    return BnbScheme(format="int8", outlier_threshold=threshold)


def parse_scheme(slug: str) -> LayerScheme | MixedScheme:
    """The scheme that `slug` names. Raises UnknownRecipe."""
    if (mixed := _MIXED.fullmatch(slug)) and int(mixed["group"]) in GROUP_SIZES:
        try:
            return MixedScheme(bits=float(mixed["bits"]), group_size=int(mixed["group"]), zero=_ZEROS[mixed["zero"]])
        except ValidationError as error:
            raise UnknownRecipe(f"{slug!r}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    if slug in ("fp32", "bf16", "fp16"):
        return FloatScheme(dtype=slug)
    if slug in ("fp8", "mxfp4", "nvfp4"):
        return MinifloatScheme(format=slug)
    if bnb := _BNB.fullmatch(slug):
        return _bnb(slug, bnb)
    match = _INTEGER.fullmatch(slug)
    group = int(match["group"]) if match and match["group"] else None
    if match is None or (group is not None and group not in GROUP_SIZES):
        raise UnknownRecipe(
            f"{slug!r} is not a number format: use fp32, bf16, fp16, fp8, mxfp4, nvfp4, int8[t<threshold>], nf4[dq], fp4[dq], "
            "w<bits>[g<group>][z|m][a8] with 2, 3, 4 or 8 bits "
            f"and groups of {', '.join(map(str, GROUP_SIZES))}, or mix<bits>g<group>[z|m] with a budget of bits a weight"
        )
    return IntegerScheme(
        weight_bits=int(match["bits"]),
        group_size=group,
        zero=_ZEROS[match["zero"]],
        activation_bits=8 if match["act"] else None,
    )
