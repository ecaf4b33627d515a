"""PTX that turns four bytes of `layout` into four operands of a tensor-core product, two in a register: for `tl.inline_asm_elementwise`.

A code becomes the number B + code, exactly, by being put into the mantissa of B, which is 128 in bf16 and 1024 in fp16; what the code
stands for is that less B and its origin, exact as well, and the scale is applied to sums. 8 bits do not fit beside 128 into bf16: they go
through fp32. A code book's number is put together from its two bytes, each looked up by the byte permutation in two halves of eight
entries. Plain strings: the interpreter has no PTX.
"""

import struct
from collections.abc import Sequence

import torch

_PATTERN = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}  # B, twice
_OR_AND = 0xEA  # (a & b) | c
_PICK = 0xE2  # c ? a : b, by bit; of a, c, b in that order: (a & b) | (c & ~b)


def base(bits: int, dtype: torch.dtype) -> int:
    """What `integers` adds to a code."""
    if dtype == torch.float16:
        return 1024
    return 0 if bits == 8 else 128


def integers(bits: int, dtype: torch.dtype) -> tuple[str, ...]:
    """For each plane: `$0`, `$1` of dtype from the bytes `$2`, and for 3 bits from `$3` as well, whose bit 0 of each byte, shifted right by
    the plane, is the code's third.
    """
    if base(bits, dtype) == 0:
        return (_assembly(*_through_fp32()),)
    low = 2 if bits == 3 else bits
    mask = ((1 << bits) - 1) * 0x00010001
    return tuple(_assembly(*_gathered(bits, low, plane), *_spread(mask, _PATTERN[dtype])) for plane in range(8 // low))


def _through_fp32() -> list[str]:
    """Bytes into the mantissa of 2^23, which is taken away again."""
    lines = []
    for byte, register in enumerate("tuml"):
        lines += [f"prmt.b32 {register}, $2, 0x4b000000, {0x7440 + byte:#x};", f"add.rn.f32 {register}, {register}, 0fcb000000;"]
    return [*lines, "cvt.rn.bf16x2.f32 $0, u, t;", "cvt.rn.bf16x2.f32 $1, l, m;"]


def _gathered(bits: int, low: int, plane: int) -> list[str]:
    """`s`: in each byte a code in the lowest bits, and of others what the mask takes away."""
    lines = [f"shr.u32 s, $2, {low * plane};"]
    if bits == 3:
        thirds = f"shl.b32 t, $3, {2 - plane};" if plane <= 2 else f"shr.u32 t, $3, {plane - 2};"
        lines += [thirds, "and.b32 t, t, 0x04040404;", f"lop3.b32 s, s, 0x03030303, t, {_OR_AND};"]
    return lines


def _spread(mask: int, pattern: int) -> list[str]:
    return [
        "prmt.b32 t, s, 0, 0x4140;",
        "prmt.b32 u, s, 0, 0x4342;",
        f"lop3.b32 $0, t, {mask:#x}, {pattern:#x}, {_OR_AND};",
        f"lop3.b32 $1, u, {mask:#x}, {pattern:#x}, {_OR_AND};",
    ]


def book(entries: Sequence[float], dtype: torch.dtype) -> tuple[str, ...]:
    """For both planes of 4 bits: `$0`, `$1` of dtype, the 16 entries rounded to it, from the bytes `$2`."""
    words = torch.tensor(entries).to(dtype).view(torch.int16).tolist()
    pairs = [struct.pack("<h", word) for word in words]
    parts = [
        [f"{int.from_bytes(bytes(pair[byte] for pair in pairs[at : at + 4]), 'little'):#x}" for at in (0, 4, 8, 12)] for byte in (0, 1)
    ]
    lines = []
    for byte, (first, second, third, fourth) in zip("lh", parts, strict=True):
        lines += [
            f"mov.b32 t, {first};",
            f"prmt.b32 u, t, {second}, s;",  # entries 0 to 7
            f"mov.b32 t, {third};",
            f"prmt.b32 t, t, {fourth}, s;",  # entries 8 to 15
            f"lop3.b32 {byte}, t, m, u, {_PICK};",
        ]
    joined = ["prmt.b32 $0, l, h, 0x5140;", "prmt.b32 $1, l, h, 0x7362;"]
    return tuple(_assembly(*_selectors(plane), *lines, *joined) for plane in (0, 1))


def _selectors(plane: int) -> list[str]:
    """`s`: four nibbles, the codes of the plane less their highest bit; `m`: that bit, over each byte."""
    highest = "shl.b32 m, $2, 4;" if plane == 0 else "mov.b32 m, $2;"
    return [
        highest,
        "prmt.b32 m, m, 0, 0xba98;",
        f"shr.u32 s, $2, {4 * plane};",
        "and.b32 s, s, 0x07070707;",
        "shr.u32 t, s, 4;",
        "or.b32 s, s, t;",
        "prmt.b32 s, s, 0, 0x4420;",
    ]


def _assembly(*lines: str) -> str:
    return "{ .reg .b32 s, t, u, m, l, h; " + " ".join(lines) + " }"
