"""`y = x @ w.T + bias` in Triton with `w` in 2, 3, 4 or 8 bits: codes become numbers in registers, products run on the tensor cores.

A program makes a tile of y: it walks the spans of its rows (`layout.py` draws them), one product of depth 32 a plane, and sums in fp32.
Codes are multiplied as integers less their zero points, which bf16 and fp16 hold exactly, and the scale is applied to the sum of a group
or of a span, whichever is smaller: the weight itself is never rounded, and two codes cost three instructions. Only the numbers of a code
book are rounded, to the inputs' dtype.
The spans are cut into segments, each summed by programs of its own and added by a second kernel, where there are too few tiles to fill the
device. For up to 64 tokens, which all decoding is, how many segments depends on the layer's shape alone, so the order of sums does as well;
for more it depends on the tokens too, as summing in a layer's own order took twice the time at 512.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.kernels.cuda import numbers
from quantizers.kernels.cuda.layout import Weight

_PROGRAMS = 768  # wanted for a few tokens, when they wait for memory: about six for each multiprocessor of the larger devices
_LARGE_PROGRAMS = 132  # wanted for many, which keep a multiprocessor busy
_MAX_SEGMENTS = 8
_MIN_SPANS = 4  # of a segment: fewer would spend their time on starting
_SUM_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """What one program makes: `rows` of the weight times `tokens`."""

    rows: int
    tokens: int
    warps: int
    stages: int


# By the number of tokens up to which each is taken: the best, or within 5 % of it, of up to 128 that were tried on an H100.
_TILES = ((16, Tile(64, 16, 2, 3)), (32, Tile(64, 32, 2, 3)), (64, Tile(128, 64, 4, 3)))
_LARGE_TILE = Tile(128, 128, 8, 3)


@dataclass(frozen=True)
class Plan:
    """How one product is cut up: its tiles, and the segments of a row."""

    tile: Tile
    segments: int


def plan(tokens: int, rows: int, spans: int) -> Plan:
    """For a weight of so many rows, each read in so many pieces."""
    tile = next((tile for most, tile in _TILES if tokens <= most), _LARGE_TILE)
    if tile is _LARGE_TILE:
        wanted = _LARGE_PROGRAMS // tiles(tile, tokens, rows)
    else:
        wanted = -(-_PROGRAMS // -(-rows // _TILES[0][1].rows))
    cut = max(1, min(wanted, _MAX_SEGMENTS, spans // _MIN_SPANS))
    return Plan(tile, -(-spans // -(-spans // cut)))  # none of them empty


def tiles(tile: Tile, tokens: int, rows: int) -> int:
    return -(-rows // tile.rows) * -(-tokens // tile.tokens)


@triton.jit
def _number(code):
    """int32 below 2^23 -> fp32 2^23 + code, by its bits: exact, and cheaper than a conversion."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    x,  # [tokens, columns]
    low,  # uint8 [spans, rows, 32]
    high,  # uint8 [spans, rows, 16], None unless BITS is 3
    scale,  # fp16 or fp32 [groups, rows]
    zero,  # POINT: uint8 [groups, rows], MINIMUM: fp16 [groups, rows], TABLE without NUMBERS: fp32 [16], otherwise None
    bias,  # [rows] or None
    y,  # [tokens, rows]; of several segments fp32 [SEGMENTS, tokens, rows], the sums of each
    tokens,
    rows,
    columns,
    spans,
    groups,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,  # as in `layout.Weight.zero_kind`
    GROUP: tl.constexpr,  # inputs of a group, a multiple of 32; 0: the whole row
    SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of the product's operands: that of x, or fp32 where the interpreter cannot multiply in it
    NUMBERS: tl.constexpr,  # PTX by plane (`numbers.py`), or None, and then numbers are made one by one
    BASE: tl.constexpr,  # what they add to a code
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    PLANES: tl.constexpr = 8 // LOW
    SPAN: tl.constexpr = 32 * PLANES
    tiles = tl.cdiv(tokens, TOKENS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)  # neighbours in time share the weights, not the tokens
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    inner = tl.arange(0, 32)
    real_row, real_token = row < rows, token < tokens
    segment = tl.program_id(1)
    per_segment = tl.cdiv(spans, SEGMENTS)
    sums = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    products = tl.zeros([ROWS, TOKENS], dtype=tl.float32)  # of codes less their origin, not scaled yet
    inputs_sum = tl.zeros([TOKENS], dtype=tl.float32)
    for span in range(segment * per_segment, tl.minimum((segment + 1) * per_segment, spans)):
        lines = tl.cast(span, tl.int64) * rows + row  # of a large matrix, more bytes than 32 bits count
        bytes_ = tl.load(low + lines[:, None] * 32 + inner[None, :], mask=real_row[:, None], other=0)
        if BITS == 3:
            thirds = tl.load(high + lines[:, None] * 16 + (inner % 16)[None, :], mask=real_row[:, None], other=0)
            thirds = thirds >> (4 * (inner // 16)).to(tl.uint8)[None, :]
        for plane in tl.static_range(PLANES):
            column = span * SPAN + plane * 32
            if plane == 0 or (GROUP > 0 and (plane * 32) % GROUP == 0):  # otherwise the group of the plane before
                group = 0
                if GROUP > 0:
                    group = tl.minimum(column // GROUP, groups - 1)
                place = tl.cast(group, tl.int64) * rows + row
                origin = tl.zeros([ROWS], dtype=tl.float32)
                if ZERO == 0:
                    origin += 1 << (BITS - 1)
                elif ZERO == 1:
                    origin += tl.load(zero + place, mask=real_row, other=0).to(tl.float32)
            if NUMBERS is None:
                code = (bytes_.to(tl.int32) >> (plane * LOW)) & ((1 << LOW) - 1)
                if BITS == 3:
                    code |= ((thirds.to(tl.int32) >> plane) & 1) << 2
                if ZERO == 3:
                    weight = tl.load(zero + code).to(x.dtype.element_ty).to(OPERAND)
                else:
                    weight = (_number(code) - (8388608.0 + origin)[:, None]).to(OPERAND)
            else:
                if BITS == 3:
                    weight = tl.inline_asm_elementwise(NUMBERS[plane], "=r,=r,r,r", [bytes_, thirds], x.dtype.element_ty, True, 4)
                else:
                    weight = tl.inline_asm_elementwise(NUMBERS[plane], "=r,=r,r", [bytes_], x.dtype.element_ty, True, 4)
                if ZERO != 3:
                    weight += (-BASE - origin).to(OPERAND)[:, None]
            real = (column + inner < columns)[:, None] & real_token[None, :]
            inputs = tl.load(x + token[None, :].to(tl.int64) * columns + (column + inner)[:, None], mask=real, other=0)
            products = tl.dot(weight, inputs.to(OPERAND), products, input_precision="ieee")
            if ZERO == 2:
                inputs_sum += tl.sum(inputs.to(tl.float32), 0)
            if GROUP > 0 and (plane == PLANES - 1 or (plane * 32 + 32) % GROUP == 0):
                sums += products * tl.load(scale + place, mask=real_row, other=0).to(tl.float32)[:, None]
                products = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
                if ZERO == 2:
                    sums += inputs_sum[None, :] * tl.load(zero + place, mask=real_row, other=0).to(tl.float32)[:, None]
                    inputs_sum = tl.zeros([TOKENS], dtype=tl.float32)
    if GROUP == 0:
        sums = products * tl.load(scale + row, mask=real_row, other=0).to(tl.float32)[:, None]
        if ZERO == 2:
            sums += inputs_sum[None, :] * tl.load(zero + row, mask=real_row, other=0).to(tl.float32)[:, None]
    place = token[None, :].to(tl.int64) * rows + row[:, None]
    real = real_row[:, None] & real_token[None, :]
    if SEGMENTS > 1:
        tl.store(y + segment.to(tl.int64) * tokens * rows + place, sums, mask=real)
    else:
        if bias is not None:
            sums += tl.load(bias + row, mask=real_row, other=0).to(tl.float32)[:, None]
        tl.store(y + place, sums.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["elements"])
def sum_kernel(partial, bias, y, elements, rows, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """`partial` fp32 [SEGMENTS, elements], added in order, and `bias` [rows] or None -> y [elements], elements = tokens * rows."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < elements
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for segment in range(SEGMENTS):
        total += tl.load(partial + tl.cast(segment, tl.int64) * elements + place, mask=real, other=0)
    if bias is not None:
        total += tl.load(bias + place % rows, mask=real, other=0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=real)


def operand(x: Tensor) -> tl.dtype:
    """What to multiply `x` in: its own dtype."""
    if x.dtype != torch.bfloat16:
        return tl.float16 if x.dtype == torch.float16 else tl.float32
    return tl.bfloat16 if x.is_cuda else tl.float32  # the interpreter would multiply the bits of bf16 as integers


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`x` [tokens, columns] bf16 or fp16, contiguous, at least one token -> [tokens, rows] in its dtype."""
    return launch(plan(x.shape[0], weight.rows, weight.low.shape[0]), x, weight, bias)


@cache
def _numbers(bits: int, book: tuple[float, ...] | None, dtype: torch.dtype) -> tuple[str, ...]:
    return numbers.integers(bits, dtype) if book is None else numbers.book(book, dtype)


def launch(cut: Plan, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`product` as `cut` says."""
    tokens, rows, tile = x.shape[0], weight.rows, cut.tile
    y = x.new_empty(tokens, rows)
    target = torch.empty(cut.segments, tokens, rows, dtype=torch.float32, device=x.device) if cut.segments > 1 else y
    ptx = _numbers(weight.bits, weight.book, x.dtype) if x.is_cuda else None
    product_kernel[(tiles(tile, tokens, rows), cut.segments)](
        x,
        weight.low,
        weight.high,
        weight.scale,
        torch.tensor(weight.book) if weight.book is not None and ptx is None else weight.zero,
        None if cut.segments > 1 else bias,
        target,
        tokens,
        rows,
        weight.columns,
        weight.low.shape[0],
        weight.scale.shape[0],
        BITS=weight.bits,
        ZERO=weight.zero_kind,
        GROUP=weight.group,
        SEGMENTS=cut.segments,
        OPERAND=operand(x),
        NUMBERS=ptx,
        BASE=numbers.base(weight.bits, x.dtype),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if cut.segments > 1:
        programs = -(-tokens * rows // _SUM_BLOCK)
        sum_kernel[(programs,)](target, bias, y, tokens * rows, rows, SEGMENTS=cut.segments, BLOCK=_SUM_BLOCK)
    return y
