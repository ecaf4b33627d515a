"""Codes of 2, 3, 4 or 8 bits to bytes and back: one dense bit stream a row, lowest bits first.

Code `i` of a row lies at bits `[i * bits, (i + 1) * bits)` of the row's stream; bit `j` of the stream is bit `j % 8` of byte `j // 8`.
A row starts on a byte of its own, and what is left of its last byte is zero. Widths that divide 8 never straddle a byte; three bits do:

    byte      0                 1                 2
    bit   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code  c c b b b a a a   f e e e d d d c   h h h g g g f f
"""

from collections.abc import Iterable

import torch
from torch import Tensor

AT_ONCE = 1 << 15  # codes that are worked on in wide integers: they take some 16 bytes each
_CODES_A_WORD = 8  # where codes straddle bytes: so many fill whole ones


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a packed row of `columns` codes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` uint8 [rows, columns], each below 2^bits -> uint8 [rows, packed_width(columns, bits)]."""
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    together = 8 // bits if 8 % bits == 0 else _CODES_A_WORD  # fill whole bytes
    padded = torch.nn.functional.pad(codes, (0, -columns % together))
    words = padded[:, ::together].to(torch.int32)
    for place in range(1, together):
        words |= padded[:, place::together].to(torch.int32) << (bits * place)
    stream = torch.stack([(words >> shift).to(torch.uint8) for shift in range(0, bits * together, 8)], -1)
    return stream.view(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def pack_rows(codes: Iterable[Tensor], bits: int) -> Tensor:
    """`pack` of matrices one under the other, of which no more than one is needed at once."""
    return torch.cat([pack(part, bits) for part in codes])


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, packed_width(columns, bits)] -> uint8 [rows, columns]."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if 8 % bits == 0:  # no code straddles a byte, so the bytes are enough
        shifts = (bits * _steps(8 // bits, packed)).to(torch.uint8)
        return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).view(rows, -1)[:, :columns]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    words = (padded.view(rows, -1, bits).to(torch.int32) << (8 * _steps(bits, packed))).sum(-1, keepdim=True, dtype=torch.int32)
    codes = (words >> (bits * _steps(_CODES_A_WORD, packed))) & ((1 << bits) - 1)  # three bits: 24 of the word's 32
    return codes.to(torch.uint8).view(rows, -1)[:, :columns]


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """What `table` [2^bits] holds for each of the uint8 `codes`, of their shape: some at a time, since each becomes an int32 on the way."""
    values = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
    for found, part in zip(torch.split(values.view(-1), AT_ONCE), torch.split(codes.flatten(), AT_ONCE), strict=True):
        torch.index_select(table, 0, part.int(), out=found)
    return values


def _steps(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.int32)
