"""Attention of one new token a sequence over a paged cache, in Triton.

A program takes the query heads that share one head of keys, and one piece of a sequence's positions, through the block table; its sums
are rescaled as the largest score grows (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3). A second kernel joins the pieces in
order. The pieces are cut by the longest sequence that the cache can hold; programs beyond a sequence's end find nothing and leave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.kernels.cuda.weight_only import operand
from quantizers.kernels.kv_cache import Plane
from quantizers.kernels.paged_decode import Attention

_STEP = 64  # positions at a time
_PIECE = 256  # the shortest piece
_PIECES = 64  # at most, of the longest sequence
_QUERIES = 16  # rows of a tensor-core product: heads that share keys are filled up to them


def piece_tokens(longest: int) -> int:
    """Positions of one piece where a sequence has at most `longest`."""
    return max(_PIECE, -(-longest // (_PIECES * _STEP)) * _STEP)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def attend_kernel(
    query,  # [n, KV_HEADS * SHARED, KEY_DIM]
    keys,  # [blocks, BLOCK, KV_HEADS, KEY_DIM]
    values,  # [blocks, BLOCK, KV_HEADS, VALUE_DIM]
    key_scales,  # fp32 [blocks, BLOCK, KV_HEADS] where keys and values are int8, else anything
    value_scales,
    tables,  # int32 [n, width]
    positions,  # int64 [n]
    sums,  # fp32 [n, KV_HEADS * SHARED, pieces, VALUE_DIM], not normalized
    peaks,  # fp32 [n, KV_HEADS * SHARED, pieces], largest scores
    masses,  # fp32 like peaks, sums of exp(score - peak)
    width,
    pieces,
    scale,
    window,  # 0: everything is seen
    softcap,  # 0: none
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,
    HEADS: tl.constexpr,  # SHARED, at least 16
    KEY_PART: tl.constexpr,  # KEY_DIM and VALUE_DIM filled up to a power of two
    VALUE_PART: tl.constexpr,
    STEP: tl.constexpr,
):
    sequence, kv, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + sequence).to(tl.int32)
    first, last = piece * PIECE, tl.minimum((piece + 1) * PIECE, position + 1)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(position + 1 - window, 0)
        first = tl.maximum(first, begin // STEP * STEP)
    if first < last:
        heads = tl.arange(0, HEADS)
        key_part, value_part = tl.arange(0, KEY_PART), tl.arange(0, VALUE_PART)
        real_head = heads < SHARED
        head = (sequence * KV_HEADS + kv).to(tl.int64) * SHARED + heads
        real_query = real_head[:, None] & (key_part < KEY_DIM)[None, :]
        rows = tl.load(query + head[:, None] * KEY_DIM + key_part[None, :], mask=real_query, other=0).to(OPERAND)
        peak = tl.full([HEADS], float("-inf"), dtype=tl.float32)
        mass = tl.zeros([HEADS], dtype=tl.float32)
        total = tl.zeros([HEADS, VALUE_PART], dtype=tl.float32)
        for start in range(first, last, STEP):
            at = start + tl.arange(0, STEP)
            real = (at < last) & (at >= begin)
            block = tl.load(tables + sequence.to(tl.int64) * width + at // BLOCK, mask=real, other=0).to(tl.int64)
            place = (block * BLOCK + at % BLOCK) * KV_HEADS + kv
            real_key = real[None, :] & (key_part < KEY_DIM)[:, None]
            # Zeros where nothing is seen: a block may hold another sequence's NaN.
            of_keys = tl.load(keys + place[None, :] * KEY_DIM + key_part[:, None], mask=real_key, other=0)
            scores = tl.dot(rows, of_keys.to(OPERAND), input_precision="ieee") * scale
            if SCALED:
                scores = scores * tl.load(key_scales + place, mask=real, other=0)[None, :]
            if CAPPED:
                scores = softcap * _tanh(scores / softcap)
            scores = tl.where(real[None, :], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            shrink = tl.exp(peak - higher)
            weights = tl.exp(scores - higher[:, None])
            real_value = real[:, None] & (value_part < VALUE_DIM)[None, :]
            of_values = tl.load(values + place[:, None] * VALUE_DIM + value_part[None, :], mask=real_value, other=0)
            mass = mass * shrink + tl.sum(weights, 1)
            if SCALED:
                weights = weights * tl.load(value_scales + place, mask=real, other=0)[None, :]
            total = total * shrink[:, None]
            total = tl.dot(weights.to(OPERAND), of_values.to(OPERAND), total, input_precision="ieee")
            peak = higher
        out = head * pieces + piece
        tl.store(peaks + out, peak, mask=real_head)
        tl.store(masses + out, mass, mask=real_head)
        real_sum = real_head[:, None] & (value_part < VALUE_DIM)[None, :]
        tl.store(sums + out[:, None] * VALUE_DIM + value_part[None, :], total, mask=real_sum)


@triton.jit
def join_kernel(
    sums,
    peaks,
    masses,
    positions,
    output,  # [n, heads, VALUE_DIM]
    heads,
    pieces,
    window,
    VALUE_DIM: tl.constexpr,
    PIECE: tl.constexpr,
    WINDOWED: tl.constexpr,
    VALUE_PART: tl.constexpr,
):
    """The pieces of one head of one sequence, in order, to its output."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + sequence).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(position + 1 - window, 0) // PIECE
    start = (sequence.to(tl.int64) * heads + head) * pieces
    part = tl.arange(0, VALUE_PART)
    peak = tl.load(peaks + start + first)
    mass = tl.load(masses + start + first)
    total = tl.load(sums + (start + first) * VALUE_DIM + part, mask=part < VALUE_DIM, other=0)
    for piece in range(first + 1, position // PIECE + 1):
        other = tl.load(peaks + start + piece)
        higher = tl.maximum(peak, other)
        shrink, grow = tl.exp(peak - higher), tl.exp(other - higher)
        mass = mass * shrink + tl.load(masses + start + piece) * grow
        added = tl.load(sums + (start + piece) * VALUE_DIM + part, mask=part < VALUE_DIM, other=0)
        total = total * shrink + added * grow
        peak = higher
    place = (sequence.to(tl.int64) * heads + head) * VALUE_DIM + part
    tl.store(output + place, (total / mass).to(output.dtype.element_ty), mask=part < VALUE_DIM)


def paged_decode(
    query: Tensor, keys: Plane, values: Plane, tables: Tensor, positions: Tensor, attention: Attention, longest: int
) -> Tensor:
    """As `quantizers.kernels.paged_decode.paged_decode`, of at least one sequence. The planes are contiguous."""
    query, tables = query.contiguous(), tables.contiguous()
    (count, heads, key_dim), (_, block, kv_heads, value_dim) = query.shape, values.numbers.shape
    piece = piece_tokens(longest)
    pieces = -(-min(longest, tables.shape[1] * block) // piece)
    sums = torch.empty(count, heads, pieces, value_dim, dtype=torch.float32, device=query.device)
    peaks, masses = (torch.empty(count, heads, pieces, dtype=torch.float32, device=query.device) for _ in range(2))
    output = query.new_empty(count, heads, value_dim)
    window, windowed = attention.window or 0, attention.window is not None
    attend_kernel[(count, kv_heads, pieces)](
        query,
        keys.numbers,
        values.numbers,
        sums if keys.scales is None else keys.scales,
        sums if values.scales is None else values.scales,
        tables,
        positions,
        sums,
        peaks,
        masses,
        tables.shape[1],
        pieces,
        attention.scale,
        window,
        attention.softcap or 0.0,
        KV_HEADS=kv_heads,
        SHARED=heads // kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK=block,
        PIECE=piece,
        WINDOWED=windowed,
        CAPPED=attention.softcap is not None,
        SCALED=keys.scales is not None,
        OPERAND=operand(query),
        HEADS=max(_QUERIES, triton.next_power_of_2(heads // kv_heads)),
        KEY_PART=max(16, triton.next_power_of_2(key_dim)),
        VALUE_PART=max(16, triton.next_power_of_2(value_dim)),
        STEP=_STEP,
        num_warps=4,
        num_stages=2,
    )
    join_kernel[(count, heads)](
        sums,
        peaks,
        masses,
        positions,
        output,
        heads,
        pieces,
        window,
        VALUE_DIM=value_dim,
        PIECE=piece,
        WINDOWED=windowed,
        VALUE_PART=max(16, triton.next_power_of_2(value_dim)),
        num_warps=4,
    )
    return output
