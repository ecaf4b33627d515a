"""The seam between the scheduler and a model: one ragged batch in, logits out. What computes it stays behind `Executor`.

The keys and values of all sequences lie in numbered blocks of `block_size` positions. A sequence finds its own through its row of
the block table: position p is slot p % block_size of block block_table[p // block_size]. Who owns which block is `blocks`' matter.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantizers.kernels.cpu.sampling import Choice

AHEAD_SECONDS = 0.016  # that steps go on by themselves before anybody sees their tokens: a screen shows a new picture as often
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class RaggedBatch:
    """Prefill chunks and decode tokens of S sequences, one after the other, T tokens in all.

    The tokens of sequence s are query_start[s] to query_start[s + 1]; their positions are consecutive, and everything before the
    first of them is in the cache already. A forward pass writes the new keys and values first, then lets every token attend to the
    positions of its own sequence up to its own.
    """

    token_ids: Int32  # [T]
    positions: Int32  # [T]
    query_start: Int32  # [S + 1]
    block_tables: Int32  # [S, max_blocks]; what lies behind a sequence's last block is never read
    logits_rows: Int32  # [R], indices of the tokens whose logits are wanted, ascending

    @property
    def sequences(self) -> int:
        return len(self.query_start) - 1

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def alone(self, sequence: int) -> "RaggedBatch":
        """The batch of this one sequence."""
        first, last = int(self.query_start[sequence]), int(self.query_start[sequence + 1])
        rows = self.logits_rows[(self.logits_rows >= first) & (self.logits_rows < last)] - first
        return RaggedBatch(
            token_ids=self.token_ids[first:last],
            positions=self.positions[first:last],
            query_start=np.array([0, last - first], np.int32),
            block_tables=self.block_tables[sequence : sequence + 1],
            logits_rows=rows.astype(np.int32),
        )


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that one step computes: `token_ids` from position `start` on."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    logits_from: int  # index in `token_ids` of the first whose logits are wanted; len(token_ids) where none is


def ragged_batch(chunks: Sequence[Chunk]) -> RaggedBatch:
    """Lay `chunks`, at least one and none empty, one after the other."""
    token_ids: list[int] = []
    positions: list[int] = []
    query_start = [0]
    logits_rows: list[int] = []
    tables = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), np.int32)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.block_table)] = chunk.block_table
        first, count = query_start[-1], len(chunk.token_ids)
        token_ids += chunk.token_ids
        positions += range(chunk.start, chunk.start + count)
        query_start.append(first + count)
        logits_rows += range(first + chunk.logits_from, first + count)
    return RaggedBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_start=np.array(query_start, np.int32),
        block_tables=tables,
        logits_rows=np.array(logits_rows, np.int32),
    )


class Executor(Protocol):
    """One model with its cache. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """What executes a step, as it is reported."""
        ...

    @property
    def block_size(self) -> int: ...

    @property
    def bytes_per_block(self) -> int:
        """Bytes of keys and values of one block, over all layers."""
        ...

    @property
    def cache_dtype(self) -> torch.dtype: ...

    @property
    def held_bytes(self) -> int:
        """What it holds beside the model, the cache and what a step needs in passing."""
        ...

    @property
    def largest(self) -> Int32 | None:
        """[R], of each row of the last `forward`: its first largest logit, or -1 where one of them is not finite; None: nobody looked."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Make a cache of this many blocks in place of the one before; its content is lost. 0 gives the memory back."""
        ...

    def copy_block(self, src: int, dst: int) -> None:
        """Make the keys and values of block `dst` those of `src`."""
        ...

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [R, vocab] fp32 of `batch.logits_rows`. Raises whatever the model's code raises; a repetition is harmless."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """What an executor may be beside: it goes on by itself, several steps of one token a sequence in one call."""

    def decode(self, batch: RaggedBatch, choices: Sequence[Choice], rounds: int, interrupted: ctypes.c_int32) -> Int32:
        """int32 [done, S]: the tokens that `rounds` steps chose, at least one, each step on those of the one before.

        `batch` has one token of every sequence, in their order, and its block tables name the blocks of all that is written. It stops
        early after a step in which a token ends its sequence, or is -1, because its logits are not finite or leave none; where another
        would not end within AHEAD_SECONDS; and after one during which another thread set `interrupted`.
        """
        ...
