"""Attention over the paged cache, as a function that transformers' modeling code calls in place of its own.

The modeling code lays the tokens of all sequences out as one row [1, heads, T, head_dim] with their own positions, so everything
outside of attention is computed for all at once. Here the new keys and values go into the cache, and each sequence attends to its
own. Sequences that bring one token each are computed together: on a CPU padded to the longest context of their group, on a GPU by a
kernel that follows the block table. No step waits for the device: what a size depends on is known to the host.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from quantizers.errors import InvalidInput
from quantizers.kernels.kv_cache import Plane
from quantizers.kernels.paged_decode import Attention, paged_decode
from server.engine.device import move
from server.engine.executor import RaggedBatch

NAME = "precis_paged"
# What transformers' modeling code may hand to attention that changes its result, and that is not done here.
_NOT_DONE = ("s_aux", "position_bias", "head_mask")
_GROUP_RATIO = 2  # in a group, the longest context is at most this many times the shortest, or
_GROUP_SLACK = 64  # this many tokens longer: short contexts cost less than another group


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    keys: Plane
    values: Plane


@dataclass(frozen=True)
class _Prefill:
    """One sequence with several new tokens."""

    first: int
    last: int
    context: int  # positions in the cache when the new ones are in
    blocks: Tensor  # [blocks]
    mask: Tensor | None  # [new, context], None where the chunk is the whole context: causal


@dataclass(frozen=True)
class _Decode:
    """Sequences with one new token each and contexts of about one length."""

    tokens: Tensor  # [group]
    blocks: Tensor  # [group, blocks]
    positions: Tensor  # [group, 1] of the new tokens
    span: Tensor  # [blocks * block_size], 0, 1, ...

    def mask(self, window: int | None) -> Tensor:  # [group, 1, 1, blocks * block_size]
        seen = self.span <= self.positions
        if window is not None:
            seen &= self.span > self.positions - window
        return seen[:, None, None]


@dataclass(frozen=True)
class _Paged:
    """Sequences with one new token each, through their block tables."""

    tokens: Tensor  # [sequences]
    tables: Tensor  # int32 [sequences, blocks]
    positions: Tensor  # [sequences]


@dataclass(frozen=True)
class DecodeStep:
    """One new token of every sequence of a batch: where they read and write, as tensors of fixed sizes."""

    layers: dict[int, LayerCache]
    slots: Tensor  # int64 [T]
    tables: Tensor  # int32 [T, blocks]
    positions: Tensor  # int64 [T]
    longest: int  # positions that a sequence may have


class PagedStep:
    """Where the tokens of one batch read and write, worked out once for all layers.

    `longest`: positions that a sequence may have, where decoding goes through the block tables; None where it is done in groups.
    """

    def __init__(self, batch: RaggedBatch, block_size: int, device: torch.device, longest: int | None = None) -> None:
        self.layers: dict[int, LayerCache] = {}
        self.longest = longest or 0
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        starts = batch.query_start.tolist()
        positions = torch.from_numpy(batch.positions).long()
        tables = torch.from_numpy(batch.block_tables).long()
        lengths = torch.tensor([last - first for first, last in itertools.pairwise(starts)])
        owner = torch.repeat_interleave(torch.arange(batch.sequences), lengths)
        slots = tables[owner, positions // block_size] * block_size + positions % block_size
        self.slots = move(slots, device)  # [T]
        self.fresh = move(slots[slots % block_size == 0] // block_size, device)  # blocks of which the first position is written
        self.prefills: list[_Prefill] = []
        single: list[tuple[int, int, int]] = []  # context, token, sequence
        for index, (first, last) in enumerate(itertools.pairwise(starts)):
            context = int(positions[last - 1]) + 1
            if last - first == 1:
                single.append((context, first, index))
                continue
            blocks = move(tables[index, : -(-context // block_size)], device)
            mask = None
            if context > last - first:
                mask = torch.arange(context, device=device) <= torch.arange(context - (last - first), context, device=device)[:, None]
            self.prefills.append(_Prefill(first, last, context, blocks, mask))
        self.paged: _Paged | None = None
        self.decodes: list[_Decode] = []
        if longest is None:
            self.decodes = [self._decode(group, positions, tables, block_size, device) for group in _groups(sorted(single))]
        elif single:
            tokens, rows = (torch.tensor(part) for part in zip(*((token, index) for _, token, index in single), strict=True))
            self.paged = _Paged(move(tokens, device), move(tables[rows].int(), device), move(positions[tokens], device))

    @staticmethod
    def _decode(group: list[tuple[int, int, int]], positions: Tensor, tables: Tensor, block_size: int, device: torch.device) -> _Decode:
        count = -(-group[-1][0] // block_size)
        tokens = torch.tensor([token for _, token, _ in group])
        contexts = torch.tensor([context for context, _, _ in group])
        blocks = tables[torch.tensor([index for _, _, index in group]), :count]
        # Behind a sequence's own blocks the table holds nothing of meaning: its first block is read there, and masked.
        blocks = torch.where(torch.arange(count) * block_size < contexts[:, None], blocks, blocks[:, :1])
        span = torch.arange(count * block_size, device=device)
        return _Decode(move(tokens, device), move(blocks, device), move(positions[tokens, None], device), span)

    def decode_mask(self, index: int, window: int | None) -> Tensor:
        """Of group `index`; layers with one window share it."""
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = self.decodes[index].mask(window)
        return self._masks[key]


def _groups(single: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    groups: list[list[tuple[int, int, int]]] = []
    for entry in single:
        if groups and entry[0] <= max(_GROUP_RATIO * groups[-1][0][0], groups[-1][0][0] + _GROUP_SLACK):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


@dataclass
class LayerShape:
    """What a layer's attention was seen to work with."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None


class Probe:
    """Stands in for a step to learn the layers' shapes: attends within the tokens given, and notes what it is called with."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}


_current: ContextVar[PagedStep | DecodeStep | Probe] = ContextVar("paged_step")


@contextmanager
def attending(step: PagedStep | DecodeStep | Probe) -> Iterator[None]:
    """Let the attention of models that run inside read and write as `step` says."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] -> [1, T, heads, head_dim].

    Raises InvalidInput where the modeling code asks for what is not done here.
    """
    asked = [name for name in _NOT_DONE if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or asked:
        raise InvalidInput(
            f"the attention of {type(module).__name__} asks for {asked or 'a mask or dropout of its own'}, which the paged cache does not "
            "serve; convert the checkpoint to an architecture with plain causal attention",
            param="model",
        )
    layer: Any = module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    step = _current.get()
    if isinstance(step, Probe):
        step.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], sliding_window)
        return _attend(query, key, value, None, scale, softcap).transpose(1, 2), None
    cache = step.layers[layer]
    if isinstance(step, DecodeStep):
        for plane, new in ((cache.keys, key), (cache.values, value)):
            plane.write(step.slots, new[0].transpose(0, 1))
        rows, attention = query[0].transpose(0, 1), Attention(scale, sliding_window, softcap)
        return paged_decode(rows, cache.keys, cache.values, step.tables, step.positions, attention, step.longest)[None], None
    for plane, new in ((cache.keys, key), (cache.values, value)):
        # What is masked still takes part in products, and a block may have held another sequence's NaN.
        plane.clear(step.fresh)
        plane.write(step.slots, new[0].transpose(0, 1))
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [T, heads, value_dim]
    for part in step.prefills:
        _prefill(part, cache, query, output, scale, sliding_window, softcap)
    for index, group in enumerate(step.decodes):
        _decode(group, cache, query, output, step.decode_mask(index, sliding_window), scale, softcap)
    if (paged := step.paged) is not None:
        rows, attention = query[0].index_select(1, paged.tokens).transpose(0, 1), Attention(scale, sliding_window, softcap)
        attended = paged_decode(rows, cache.keys, cache.values, paged.tables, paged.positions, attention, step.longest)
        output.index_copy_(0, paged.tokens, attended)
    return output[None], None


def _prefill(
    part: _Prefill, cache: LayerCache, query: Tensor, output: Tensor, scale: float, window: int | None, softcap: float | None
) -> None:
    keys, values = (
        plane.read(part.blocks, query.dtype).flatten(0, 1)[: part.context].transpose(0, 1)[None] for plane in (cache.keys, cache.values)
    )
    mask = part.mask
    if window is not None and part.context > window:
        ends = torch.arange(part.context - (part.last - part.first), part.context, device=query.device)[:, None]
        span = torch.arange(part.context, device=query.device)
        mask = (span <= ends) & (span > ends - window)
    output[part.first : part.last] = _attend(query[:, :, part.first : part.last], keys, values, mask, scale, softcap)[0].transpose(0, 1)


def _decode(group: _Decode, cache: LayerCache, query: Tensor, output: Tensor, mask: Tensor, scale: float, softcap: float | None) -> None:
    keys, values = (plane.read(group.blocks, query.dtype).flatten(1, 2).transpose(1, 2) for plane in (cache.keys, cache.values))
    rows = query[0].index_select(1, group.tokens).transpose(0, 1)  # [group, heads, head_dim]
    # The heads that share keys become the rows of one product, so that the keys are neither repeated nor read more than once.
    shared = rows.view(rows.shape[0], keys.shape[1], -1, rows.shape[-1])
    attended = _attend(shared, keys, values, mask, scale, softcap)
    output.index_copy_(0, group.tokens, attended.reshape(rows.shape[0], rows.shape[1], -1))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Query [n, heads, q, head_dim], keys and values [n, kv_heads, k, head_dim] -> [n, heads, q, head_dim]; no mask: causal, q == k."""
    grouped = query.shape[1] != keys.shape[1]
    if softcap is None:
        if grouped and mask is not None and query.is_cuda:
            # With a mask and shared keys torch would materialise all scores; its kernel that does not wants a key for each query head.
            keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
            grouped = False
        return scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    if grouped:
        keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (keys, values))
    if mask is None:
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = softcap * torch.tanh(query @ keys.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights @ values


AttentionInterface.register(NAME, paged_attention)
