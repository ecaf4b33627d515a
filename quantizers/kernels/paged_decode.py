"""Attention of one new token a sequence over a paged cache, without a word from the device to the host: the sizes of all that is computed
follow from the arguments' shapes, never from their values. So a step can be recorded once and replayed.

The definition in torch, which gathers whole tables, and the choice of what runs; on a GPU that is `cuda/paged_decode.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.kernels import cuda
from quantizers.kernels.kv_cache import Plane


@dataclass(frozen=True)
class Attention:
    """What a layer's attention does beside the products. `window`: positions that a token sees, its own included; None: all."""

    scale: float
    window: int | None = None
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)


def paged_decode(
    query: Tensor, keys: Plane, values: Plane, tables: Tensor, positions: Tensor, attention: Attention, longest: int
) -> Tensor:
    """`query` [n, heads, key_dim] of tokens whose keys and values are in the cache -> [n, heads, value_dim] in its dtype.

    `keys` with heads of key_dim, `values` of value_dim; `tables` int32 [n, blocks of a sequence], of which what lies
    behind a sequence's last block is not used but must name a block of the cache; `positions` int64 [n]. `longest` bounds the positions
    of any sequence of this cache, and decides how a long one is cut into pieces: a row's result does not depend on its neighbours.
    """
    if query.shape[0] and cuda.why_not(query.device) is None:
        from quantizers.kernels.cuda import paged_decode as triton_kernels

        return triton_kernels.paged_decode(query, keys, values, tables, positions, attention, longest)
    return paged_decode_reference(query, keys, values, tables, positions, attention)


def paged_decode_reference(query: Tensor, keys: Plane, values: Plane, tables: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """The definition: scores and sums in fp32. What is not seen may be anything, NaN included."""
    block_size, kv_heads = keys.numbers.shape[1:3]
    span = torch.arange(tables.shape[1] * block_size, device=query.device)
    seen = span <= positions[:, None]  # [n, span]
    if attention.window is not None:
        seen &= span > positions[:, None] - attention.window
    of_keys, of_values = (
        torch.where(seen[..., None, None], plane.read(tables.long(), torch.float32).flatten(1, 2), 0.0) for plane in (keys, values)
    )  # [n, span, kv_heads, dim]
    rows = query.float().view(query.shape[0], kv_heads, -1, query.shape[-1])  # [n, kv_heads, shared, key_dim]
    scores = torch.einsum("nhgd,nshd->nhgs", rows, of_keys) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("nhgs,nshd->nhgd", weights, of_values).flatten(1, 2).to(query.dtype)
