"""Tokens to int8 and int8 products in Triton: sums in int32, so exact in any order; scales afterwards, in fp32.

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 3.2) is the same with a second product beside the first: the columns of the
input that hold an outlier, in floating point, with the same codes. Which columns those are is read from memory, never by the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.kernels.cuda.weight_only import Plan, operand, plan, tiles

_DEPTH = 128  # inputs of a row that are read at a time: whole cache lines
_TOKEN_BLOCK = 1024
_SUM_BLOCK = 1024


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, of fp32 below 2^22 in size: the addition leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_kernel(
    x,  # [tokens, columns]
    outlier,  # uint8 [columns], not 0 where a column is left out of the codes, or None
    codes,  # int8 [tokens, columns]
    scale,  # fp32 [tokens]
    columns,
    LLM: tl.constexpr,  # the rounding of LLM.int8(), otherwise that of `quantizers.activations`
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * columns
    place = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    spoiled = tl.zeros([BLOCK], dtype=tl.float32)  # NaN where any value is not finite: a maximum would lose it
    for first in range(0, columns, BLOCK):
        column = first + place
        values = tl.load(x + start + column, mask=column < columns, other=0).to(tl.float32)
        spoiled += values * 0.0
        if outlier is not None:
            values = tl.where(tl.load(outlier + column, mask=column < columns, other=0) != 0, 0.0, values)
        largest = tl.maximum(largest, tl.abs(values))
    tiny = 1.1754943508222875e-38
    top = tl.max(largest, 0)
    if LLM:
        step = tl.math.div_rn(tl.maximum(top, tiny), 127.0)
    else:
        step = tl.maximum(tl.math.div_rn(top, 127.5), tiny)
    spoil = tl.sum(spoiled, 0)
    tl.store(scale + tl.program_id(0), step + spoil)
    for first in range(0, columns, BLOCK):
        column = first + place
        values = tl.load(x + start + column, mask=column < columns, other=0).to(tl.float32)
        if outlier is not None:
            values = tl.where(tl.load(outlier + column, mask=column < columns, other=0) != 0, 0.0, values)
        if LLM:
            quotient = values * tl.math.div_rn(127.0, tl.maximum(top, 7.888609052210118e-31))  # 2^-100: smaller ones would overflow it
        else:
            quotient = tl.math.div_rn(values, step)
        quotient = tl.where(spoil == 0, quotient, 0.0)  # what is not a number has no code; its scale says so
        rounded = tl.minimum(tl.maximum(_round(quotient), -128.0), 127.0)
        tl.store(codes + start + column, rounded.to(tl.int8), mask=column < columns)


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    codes,  # int8 [tokens, columns]
    token_scale,  # fp32 [tokens]
    x,  # [tokens, columns], read where there are outliers
    outlier,  # uint8 [columns] or None
    weight,  # int8 [rows, columns]
    row_scale,  # fp32 [rows]
    bias,  # [rows] or None
    y,  # [tokens, rows]; of several segments int32 [SEGMENTS, tokens, rows]
    beside,  # of several segments with outliers: fp32 [SEGMENTS, tokens, rows], otherwise None
    tokens,
    rows,
    columns,
    SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype in which outliers are multiplied
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, TOKENS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    real_row, real_token = row < rows, token < tokens
    piece = tl.cdiv(tl.cdiv(columns, DEPTH), SEGMENTS) * DEPTH
    first = tl.program_id(1) * piece
    last = tl.minimum(first + piece, columns)
    sums = tl.zeros([ROWS, TOKENS], dtype=tl.int32)
    outside = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for start in range(first, last, DEPTH):
        column = start + tl.arange(0, DEPTH)
        real = column < columns
        of_row = tl.load(weight + row[:, None].to(tl.int64) * columns + column[None, :], mask=real_row[:, None] & real[None, :], other=0)
        places = token[None, :].to(tl.int64) * columns + column[:, None]
        of_token = tl.load(codes + places, mask=real[:, None] & real_token[None, :], other=0)
        sums = tl.dot(of_row, of_token, sums, out_dtype=tl.int32)
        if outlier is not None:
            flags = tl.load(outlier + column, mask=real, other=0)
            if tl.max(flags.to(tl.int32), 0) > 0:  # most pieces of a row have none
                values = tl.load(x + places, mask=(flags != 0)[:, None] & real_token[None, :], other=0)
                outside = tl.dot(of_row.to(OPERAND), values.to(OPERAND), outside, input_precision="ieee")
    places = token[None, :].to(tl.int64) * rows + row[:, None]
    real_tile = real_row[:, None] & real_token[None, :]
    if SEGMENTS > 1:
        places += tl.program_id(1).to(tl.int64) * tokens * rows
        tl.store(y + places, sums, mask=real_tile)
        if outlier is not None:
            tl.store(beside + places, outside, mask=real_tile)
    else:
        by_row = tl.load(row_scale + row, mask=real_row, other=0)[:, None]
        result = sums.to(tl.float32) * tl.load(token_scale + token, mask=real_token, other=0)[None, :] * by_row
        if outlier is not None:
            result += outside * by_row
        if bias is not None:
            result += tl.load(bias + row, mask=real_row, other=0).to(tl.float32)[:, None]
        tl.store(y + places, result.to(y.dtype.element_ty), mask=real_tile)


@triton.jit(do_not_specialize=["elements"])
def sum_kernel(partial, beside, token_scale, row_scale, bias, y, elements, rows, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """What a split `product_kernel` left, `partial` int32 and `beside` fp32 or None [SEGMENTS, elements] -> y [elements], with scales."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < elements
    sums = tl.zeros([BLOCK], dtype=tl.int32)
    outside = tl.zeros([BLOCK], dtype=tl.float32)
    for segment in range(SEGMENTS):
        where = tl.cast(segment, tl.int64) * elements + place
        sums += tl.load(partial + where, mask=real, other=0)
        if beside is not None:
            outside += tl.load(beside + where, mask=real, other=0)
    by_row = tl.load(row_scale + place % rows, mask=real, other=0)
    result = sums.to(tl.float32) * tl.load(token_scale + place // rows, mask=real, other=0) * by_row
    if beside is not None:
        result += outside * by_row
    if bias is not None:
        result += tl.load(bias + place % rows, mask=real, other=0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=real)


def quantize(x: Tensor, outlier: Tensor | None, *, llm: bool) -> tuple[Tensor, Tensor]:
    """`x` [tokens, columns], contiguous -> int8 codes of that shape and fp32 [tokens] scales."""
    codes, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    quantize_kernel[(x.shape[0],)](x, outlier, codes, scale, x.shape[1], LLM=llm, BLOCK=_TOKEN_BLOCK, num_warps=4)
    return codes, scale


def product(x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, threshold: float | None) -> Tensor:
    """`x` [tokens, columns], contiguous, at least one token, times int8 `weight` [rows, columns] -> [tokens, rows] in its dtype.

    `threshold`: None quantizes whole tokens; otherwise LLM.int8(), where 0 means that no column is an outlier.
    """
    return launch(plan(x.shape[0], weight.shape[0], -(-weight.shape[1] // _DEPTH)), x, weight, row_scale, bias, threshold)


def launch(cut: Plan, x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, threshold: float | None) -> Tensor:
    """`product` as `cut` says."""
    (tokens, columns), rows, tile = x.shape, weight.shape[0], cut.tile
    outlier = (x.abs() >= threshold).any(0).to(torch.uint8) if threshold else None
    codes, token_scale = quantize(x, outlier, llm=threshold is not None)
    y, beside = x.new_empty(tokens, rows), None
    target = y
    if cut.segments > 1:
        target = torch.empty(cut.segments, tokens, rows, dtype=torch.int32, device=x.device)
        beside = torch.empty_like(target, dtype=torch.float32) if outlier is not None else None
    product_kernel[(tiles(tile, tokens, rows), cut.segments)](
        codes,
        token_scale,
        x,
        outlier,
        weight,
        row_scale,
        None if cut.segments > 1 else bias,
        target,
        beside,
        tokens,
        rows,
        columns,
        SEGMENTS=cut.segments,
        OPERAND=operand(x),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        DEPTH=_DEPTH,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if cut.segments > 1:
        programs = -(-tokens * rows // _SUM_BLOCK)
        arguments = (target, beside, token_scale, row_scale, bias, y, tokens * rows, rows)
        sum_kernel[(programs,)](*arguments, SEGMENTS=cut.segments, BLOCK=_SUM_BLOCK)
    return y
