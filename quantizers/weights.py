"""The tensors of one quantized weight matrix `[out_features, in_features]`: their names, shapes and dtypes, and what they mean.

This is the form in which methods hand a layer over, in which artifacts store it, and from which kernels prepare their own. `G` is the
number of groups of a row; a per-channel format has one.

    integer   codes      uint8 [out, packed_width(in)]   codes from 0 up, packed; w8 symmetric: int8 [out, in], two's complement
              scale      fp16  [out, G]
              zero_point uint8 [out, G]                  `z` only
              minimum    fp16  [out, G]                  `m` only
    bnb int8  codes      int8  [out, in]
              absmax     fp32  [out]                     w = codes * absmax / 127
    bnb 4 bit codes      uint8 [ceil(out * in / 2)]      row-major codes of the flattened matrix, the first in the high nibble
              absmax     fp32  [blocks]                  w = table[code] * absmax; blocks = ceil(out * in / 64)
         dq   absmax     uint8 [blocks]                  instead: absmax = dynamic_map[code] * nested_absmax + nested_offset
              nested_absmax fp32 [ceil(blocks / 256)]
              nested_offset fp32 [1]                     the mean of all absmax
    fp8       codes      uint8 [out, in]                 e4m3
              scale      fp32  [out, 1]                  w = codes * scale
    mxfp4     codes      uint8 [out, in / 2]             e2m1, two a byte
              scale      uint8 [out, in / 32]            e8m0; w = codes * scale
    nvfp4     codes      uint8 [out, in / 2]             e2m1, two a byte
              scale      uint8 [out, in / 16]            e4m3
              global_scale fp32 [1]                      w = codes * scale / global_scale
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantizers.errors import CorruptData
from quantizers.minifloat import decode, holds_nan
from quantizers.packing import looked_up, packed_width, unpack
from quantizers.scheme import BNB_BLOCK, BNB_NESTED_BLOCK, BnbScheme, IntegerScheme, MinifloatScheme

QuantizedScheme = IntegerScheme | BnbScheme | MinifloatScheme
Spec = tuple[tuple[int, ...], torch.dtype]

# Dettmers et al. 2023, QLoRA (arXiv 2305.14314), appendix E: the quantiles of a normal distribution, by code.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of fraction, by code; divided by the largest magnitude.
FP4_TABLE = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@dataclass(frozen=True)
class QuantizedWeight:
    """One layer's weight in `scheme`. Raises CorruptData where `tensors` are not exactly those that the scheme has."""

    scheme: QuantizedScheme
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        specs = tensor_specs(self.scheme, self.out_features, self.in_features)
        if self.tensors.keys() != specs.keys():
            raise CorruptData(f"a weight in {self.scheme.slug} has the tensors {sorted(specs)}, not {sorted(self.tensors)}")
        for name, (shape, dtype) in specs.items():
            found = self.tensors[name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise CorruptData(
                    f"{name} of a weight [{self.out_features}, {self.in_features}] in {self.scheme.slug} is {dtype} {list(shape)}, "
                    f"not {found.dtype} {list(found.shape)}"
                )
            if found.is_floating_point() and not bool(torch.isfinite(found).all()):
                raise CorruptData(f"{name} of a weight in {self.scheme.slug} holds values that are not finite")
        if isinstance(self.scheme, MinifloatScheme) and holds_nan(self.scheme.format, self.tensors):
            raise CorruptData(f"a weight in {self.scheme.slug} holds values that are not finite")

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self) -> Tensor:
        """fp32 [out_features, in_features]."""
        return dequantize(self.scheme, self.out_features, self.in_features, self.tensors)

    def to(self, device: torch.device) -> "QuantizedWeight":
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return QuantizedWeight(self.scheme, self.out_features, self.in_features, moved)


def join_rows(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Integer weights of the same format and width, one under the other."""
    first = pieces[0]
    assert isinstance(first.scheme, IntegerScheme), "blocks of bitsandbytes run across rows"
    tensors = {name: torch.cat([piece.tensors[name] for piece in pieces]) for name in first.tensors}
    return QuantizedWeight(first.scheme, sum(piece.out_features for piece in pieces), first.in_features, tensors)


def groups(scheme: IntegerScheme, in_features: int) -> int:
    """Groups of a row. The last one may not be ragged: whoever quantizes checks `fits`."""
    return in_features // scheme.group_size if scheme.group_size else 1


def fits(scheme: QuantizedScheme, in_features: int) -> bool:
    """Whether rows of `in_features` can be cut into the scheme's groups."""
    return isinstance(scheme, BnbScheme) or scheme.group_size is None or in_features % scheme.group_size == 0


def tensor_specs(scheme: QuantizedScheme, out_features: int, in_features: int) -> dict[str, Spec]:
    """Name -> (shape, dtype) of the tensors that hold a weight `[out_features, in_features]`."""
    if isinstance(scheme, BnbScheme):
        if scheme.format == "int8":
            return {"codes": ((out_features, in_features), torch.int8), "absmax": ((out_features,), torch.float32)}
        size = out_features * in_features
        blocks = -(-size // BNB_BLOCK)
        codes: dict[str, Spec] = {"codes": ((-(-size // 2),), torch.uint8)}
        if not scheme.double_quant:
            return codes | {"absmax": ((blocks,), torch.float32)}
        nested: dict[str, Spec] = {
            "nested_absmax": ((-(-blocks // BNB_NESTED_BLOCK),), torch.float32),
            "nested_offset": ((1,), torch.float32),
        }
        return codes | {"absmax": ((blocks,), torch.uint8)} | nested
    if isinstance(scheme, MinifloatScheme):
        return _minifloat_specs(scheme, out_features, in_features)
    per_group = (out_features, groups(scheme, in_features))
    width = packed_width(in_features, scheme.weight_bits)
    specs: dict[str, Spec] = {
        "codes": ((out_features, width), torch.int8 if is_plain_int8(scheme) else torch.uint8),
        "scale": (per_group, torch.float16),
    }
    if scheme.zero == "integer":
        specs["zero_point"] = (per_group, torch.uint8)
    if scheme.zero == "minimum":
        specs["minimum"] = (per_group, torch.float16)
    return specs


def _minifloat_specs(scheme: MinifloatScheme, out_features: int, in_features: int) -> dict[str, Spec]:
    if scheme.group_size is None:
        return {"codes": ((out_features, in_features), torch.uint8), "scale": ((out_features, 1), torch.float32)}
    specs: dict[str, Spec] = {
        "codes": ((out_features, packed_width(in_features, 4)), torch.uint8),
        "scale": ((out_features, in_features // scheme.group_size), torch.uint8),
    }
    return specs | ({"global_scale": ((1,), torch.float32)} if scheme.format == "nvfp4" else {})


def is_plain_int8(scheme: IntegerScheme) -> bool:
    """Symmetric bytes are stored in two's complement, as every int8 product reads them; all other codes count from 0."""
    return scheme.weight_bits == 8 and scheme.symmetric


def dequantize(scheme: QuantizedScheme, out_features: int, in_features: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [out_features, in_features]: the weights that the codes stand for."""
    if isinstance(scheme, IntegerScheme):
        return integer_values(scheme, out_features, in_features, tensors, torch.float32)
    if isinstance(scheme, MinifloatScheme):
        return decode(scheme.format, out_features, in_features, tensors)
    codes = tensors["codes"]
    if scheme.format == "int8":
        return codes.float().mul_((tensors["absmax"] / 127).unsqueeze(-1))
    size = out_features * in_features
    whole = torch.nn.functional.pad(codes, (0, -len(codes) % (BNB_BLOCK // 2)))
    values = looked_up(table(scheme.format, codes.device), torch.stack((whole >> 4, whole & 0xF), -1))
    values.view(-1, BNB_BLOCK).mul_(block_absmax(scheme, tensors).unsqueeze(-1))
    return values.view(-1)[:size].view(out_features, in_features)


def integer_values(scheme: IntegerScheme, out_features: int, in_features: int, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """`dtype` [out_features, in_features]: scale * (code - zero_point), exact in fp32, or scale * code + minimum, exact in fp64."""
    values = unpack(tensors["codes"], scheme.weight_bits, in_features).to(dtype)
    count = groups(scheme, in_features)
    grouped = values.view(out_features, count, in_features // count)
    if scheme.symmetric and not is_plain_int8(scheme):
        grouped -= 1 << (scheme.weight_bits - 1)
    elif scheme.zero == "integer":
        grouped -= tensors["zero_point"].to(dtype).unsqueeze(-1)
    grouped *= tensors["scale"].to(dtype).unsqueeze(-1)
    if scheme.zero == "minimum":
        grouped += tensors["minimum"].to(dtype).unsqueeze(-1)
    return values


def block_absmax(scheme: BnbScheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [blocks] of a weight in nf4 or fp4, with double quantization undone."""
    absmax = tensors["absmax"]
    if not scheme.double_quant:
        return absmax
    values = dynamic_map(absmax.device)[absmax.int()]
    nested = torch.nn.functional.pad(values, (0, -len(values) % BNB_NESTED_BLOCK)).view(-1, BNB_NESTED_BLOCK)
    scaled = nested * tensors["nested_absmax"].unsqueeze(-1)
    return scaled.view(-1)[: len(values)] + tensors["nested_offset"]


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """fp32 [256], rising: the signed dynamic type of Dettmers et al. 2022 (8-bit optimizers, arXiv 2110.02861, section 2.1).

    Seven decades below 1; decade 10^-e is cut into 2^(6 - e) equal parts between a tenth of it and itself, whose middles are the values.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - exponent) + 1, dtype=torch.float32)
        middles = 10.0**-exponent * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def code_book(format_: str) -> tuple[float, ...]:
    """What each of the 16 codes of `nf4` or `fp4` stands for, in units of its block's absmax."""
    return NF4_TABLE if format_ == "nf4" else FP4_TABLE


def table(format_: str, device: torch.device) -> Tensor:
    """`code_book` as fp32 [16]."""
    return torch.tensor(code_book(format_), device=device)
