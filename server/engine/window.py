"""Logits of every token of a text through an executor that serves nobody else, in steps as the engine makes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.executor import Chunk, Executor, ragged_batch

STEP_TOKENS = 128  # what of a prompt the engine computes beside running streams


def window_logits(executor: Executor, ids: Sequence[int], *, room: int = 0) -> Tensor:
    """fp32 [tokens, vocabulary]. Makes a new cache that has `room` for so many tokens more; the caller gives it back."""
    executor.allocate(-(-(len(ids) + room) // executor.block_size))
    starts = range(0, len(ids), STEP_TOKENS)
    return torch.cat([next_logits(executor, ids[start : start + STEP_TOKENS], start) for start in starts])


def next_logits(executor: Executor, ids: Sequence[int], start: int) -> Tensor:
    """fp32 [tokens, vocabulary] of `ids` at positions from `start` on, what came before being in the cache."""
    blocks = range(-(-(start + len(ids)) // executor.block_size))
    return executor.forward(ragged_batch([Chunk(ids, start, blocks, 0)]))
