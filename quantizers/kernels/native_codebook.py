"""Our own CPU kernel of the formats with 16 levels: NF4 and FP4 of bitsandbytes, with double quantization or not, MXFP4 and NVFP4.

Inputs are rounded to 8 bits by 32, as of every weight-only format here, and levels are 8-bit integers times one unit: exact for e2m1, whose
levels are multiples of a half; those of NF4 and FP4 are off by 0.5 and 0.3 % of a weight's size, where the formats themselves are off by 9
and 12 %. Scales are held as the formats store them; the fp32 absmax of NF4 and FP4, and what double quantization leaves of them, in fp16.
"""

import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.kernels.base import LayerKind
from quantizers.kernels.cpu import library
from quantizers.kernels.native import Form, NativeWeightOnly, has_native_shape
from quantizers.minifloat import E2M1
from quantizers.scheme import BNB_BLOCK, BnbScheme, MinifloatScheme
from quantizers.weights import FP4_TABLE, NF4_TABLE, QuantizedScheme, QuantizedWeight, block_absmax

_OFFSET = 128  # of levels as the kernel reads them
# Found by trying units in steps of 1e-4 of the range: the one with the least error of normal weights' levels.
_NF4_UNIT, _FP4_UNIT = 1 / 124.11, 1 / 120
_E4M3_FACTOR = 2.0**8  # e4m3 is read as fp16, whose exponent counts from 8 further down
_FP16_EXPONENT = 15  # the largest absmax of a matrix comes to lie between 2^14 and 2^15, so that 2^-29 of it still has 11 bits


@dataclass(frozen=True)
class Book:
    """How a format is packed: `unit` times whole numbers are its levels, groups of `group` inputs lie together."""

    kind: int
    group: int
    levels: tuple[float, ...]
    unit: float

    @property
    def whole(self) -> tuple[int, ...]:
        """The levels as integers, by code."""
        return tuple(round(level / self.unit) for level in self.levels)


_SIGNED_E2M1 = (*E2M1, *(-value for value in E2M1))
BOOKS = {
    "nf4": Book(library.CODEBOOK, BNB_BLOCK, NF4_TABLE, _NF4_UNIT),
    "fp4": Book(library.CODEBOOK, BNB_BLOCK, FP4_TABLE, _FP4_UNIT),
    "mxfp4": Book(library.CODEBOOK_POWER, library.INPUTS, _SIGNED_E2M1, 0.5),
    "nvfp4": Book(library.CODEBOOK_HALVES, library.INPUTS, _SIGNED_E2M1, 0.5),
}


def book_of(scheme: QuantizedScheme) -> Book | None:
    """How `scheme` is packed; None where it has no 16 levels."""
    return BOOKS.get(scheme.format) if isinstance(scheme, BnbScheme | MinifloatScheme) else None


class NativeCodebook(NativeWeightOnly):
    name = "native-cpu-codebook-a8g32"

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        book = book_of(layer.scheme)
        return book is not None and has_native_shape(layer) and layer.in_features % book.group == 0

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes, scale, factor = _packed_rows(weight)
        values = struct.pack("16Bf", *(level + _OFFSET for level in self._book.whole), factor * self._book.unit)
        header = torch.frombuffer(bytearray(values.ljust(library.HEADER_BYTES, b"\0")), dtype=torch.uint8)
        source = library.Source(codes=codes.data_ptr(), row_bytes=codes.shape[1], flip=0, scale=scale.data_ptr(), header=header.data_ptr())
        return {"packed": self._pack(source)}

    @property
    def _book(self) -> Book:
        book = book_of(self.layer.scheme)
        assert book is not None
        return book

    def form(self) -> Form:
        return Form(self._book.kind, 4, self._book.group)


def _packed_rows(weight: QuantizedWeight) -> tuple[Tensor, Tensor, float]:
    """Codes uint8 [rows, columns / 2], the first in the low nibble; scales as stored, [rows, ...]; what all scales are multiplied by."""
    scheme, tensors, rows = weight.scheme, weight.tensors, weight.out_features
    if isinstance(scheme, MinifloatScheme):
        factor = _E4M3_FACTOR / float(tensors["global_scale"]) if scheme.format == "nvfp4" else 1.0
        return tensors["codes"].contiguous(), tensors["scale"].contiguous(), factor
    assert isinstance(scheme, BnbScheme)
    codes = tensors["codes"].view(rows, -1)
    absmax = block_absmax(scheme, tensors)
    factor = _below(float(absmax.abs().max()))
    return (codes << 4) | (codes >> 4), (absmax / factor).half().view(rows, -1).contiguous(), factor


def _below(largest: float) -> float:
    """The power of two by which the largest scale is divided to lie in the upper reaches of fp16; within fp32's normal numbers."""
    exponent = math.frexp(largest)[1] - _FP16_EXPONENT if largest > 0 else 0
    return 2.0 ** max(exponent, -100)
