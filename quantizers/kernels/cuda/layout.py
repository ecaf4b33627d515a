"""How codes lie in device memory for the Triton kernels. Plain torch, on any device.

A span is as many inputs as fill one 32-byte line of a row. It is cut into planes of 32 inputs, one for each code that a byte holds, so
that one line, shifted, is a plane of codes beside each other: 32 consecutive inputs, the depth of one tensor-core product, inside one
group, with nothing to shuffle. Lines of neighbouring rows lie beside each other: what a program reads at a time is one piece.

    low  uint8 [spans, rows, 32]     bit  7 6 5 4 3 2 1 0        code of input
      8 bits, span  32: byte j            a a a a a a a a        a = j
      4 bits, span  64: byte j            b b b b a a a a        a = j, b = 32 + j
      2 bits, span 128: byte j            d d c c b b a a        a = j, b = 32 + j, c = 64 + j, d = 96 + j
      3 bits, span 128: the two low bits as for 2 bits, and the third bits in

    high uint8 [spans, rows, 16]     bit  7 6 5 4 3 2 1 0
                          byte j          h g f e d c b a        a = j,      b = 32 + j, c = 64 + j, d = 96 + j,
                                                                 e = 16 + j, f = 48 + j, g = 80 + j, h = 112 + j

A row that does not fill its last span is filled up with codes of zero, whose inputs are read as zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PLANE = 32
_HALF = PLANE // 2

# What a code q stands for: scale * (q - 2^(bits-1)), scale * (q - zero_point), scale * q + minimum, scale * table[q].
SYMMETRIC, POINT, MINIMUM, TABLE = 0, 1, 2, 3


def low_bits(bits: int) -> int:
    """Of each code, those that lie in `low`."""
    return 2 if bits == 3 else bits


def span_inputs(bits: int) -> int:
    return PLANE * (8 // low_bits(bits))


def spans(columns: int, bits: int) -> int:
    """Of a row of `columns` inputs, the last one perhaps not full."""
    return -(-columns // span_inputs(bits))


def interleave(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """`codes` uint8 [rows, columns], each below 2^bits -> `low`, and `high` where there are 3 bits, as drawn above."""
    rows, columns = codes.shape
    count, planes, width = spans(columns, bits), 8 // low_bits(bits), low_bits(bits)
    padded = torch.nn.functional.pad(codes, (0, count * span_inputs(bits) - columns))
    cut = padded.view(rows, count, planes, PLANE).transpose(0, 1)  # [spans, rows, planes, 32]
    laid = {"low": _joined([(cut[:, :, plane] & ((1 << width) - 1)) << (plane * width) for plane in range(planes)])}
    if bits == 3:
        third = cut >> 2
        laid["high"] = _joined(
            [third[:, :, plane, half * _HALF : (half + 1) * _HALF] << (plane + planes * half) for half in (0, 1) for plane in range(planes)]
        )
    return laid


def _joined(pieces: list[Tensor]) -> Tensor:
    joined = pieces[0].contiguous()
    for piece in pieces[1:]:
        joined = joined | piece
    return joined


@dataclass(frozen=True)
class Weight:
    """A weight in this layout, and what its codes stand for. `group` is 0 where a row has one scale."""

    rows: int
    columns: int
    bits: int
    zero_kind: int
    group: int
    low: Tensor
    high: Tensor | None
    scale: Tensor  # fp16, or fp32 beside a table, [groups, rows]
    zero: Tensor | None  # POINT: uint8 [groups, rows]; MINIMUM: fp16 [groups, rows]
    book: tuple[float, ...] | None = None  # TABLE: what its 16 codes stand for
