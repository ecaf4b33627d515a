"""Decode steps of a few fixed sizes, each recorded once and replayed: a batch is padded to the next size.

On a GPU a recording is a CUDA graph (`cuda_graph`), which starts a step's hundreds of kernels at once; elsewhere it is the step itself, so
that what surrounds a graph is the same code. What is recorded reads its inputs from tensors that stay where they are.

Padding repeats the batch's first sequence. A repetition writes the very keys and values that the first writes, to the same place, so no
block has to be spared for it, and kernels that look at the whole batch (LLM.int8() at its outliers) see nothing new.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.device import move
from server.engine.executor import RaggedBatch

SIZES = (1, 2, 4, 8, 16, 24, 32)  # up to as many as a step has sequences (`scheduler.Limits`); the padding is at most a half
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class NotRecordable(Exception):
    """A step that runs but cannot be recorded, because it waits for the device somewhere."""


@dataclass(frozen=True)
class DecodeInputs:
    """One token of each of `size` sequences, in tensors that stay."""

    ids: Tensor  # int64 [3, size]: token ids, positions, slots in the cache
    tables: Tensor  # int32 [size, blocks]

    @property
    def token_ids(self) -> Tensor:
        return self.ids[0]

    @property
    def positions(self) -> Tensor:
        return self.ids[1]

    @property
    def slots(self) -> Tensor:
        return self.ids[2]


def call_again(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The recorder where nothing can be recorded: a replay computes the step as it is written."""
    return step


class DecodeBuckets:
    """Recordings of `compute`, which takes inputs to logits [size, vocab], by size."""

    def __init__(self, compute: Callable[[DecodeInputs], Tensor], record: Record, *, block_size: int, device: torch.device) -> None:
        self._compute, self._record = compute, record
        self._block_size, self._device = block_size, device
        self._tables: Tensor | None = None
        self._inputs: dict[int, DecodeInputs] = {}
        self._replays: dict[int, Callable[[], Tensor]] = {}

    @staticmethod
    def bytes(vocab_size: int, blocks: int) -> int:
        """Estimate of what the recordings hold: the logits of every size in fp32, and the inputs."""
        return sum(SIZES) * vocab_size * 4 + SIZES[-1] * blocks * 4 + sum(SIZES) * 3 * 8

    @property
    def recorded(self) -> tuple[int, ...]:
        return tuple(sorted(self._replays))

    def allocate(self, blocks: int) -> None:
        """For a cache in which a sequence has at most `blocks` blocks; 0 without one. Recordings of an earlier cache are dropped."""
        self._replays.clear()
        self._inputs.clear()
        self._tables = torch.zeros(SIZES[-1], blocks, dtype=torch.int32, device=self._device) if blocks else None

    def takes(self, batch: RaggedBatch) -> bool:
        """Whether every sequence of `batch` brings one token and wants its logits, and a recording has room for them."""
        return (
            self._tables is not None
            and batch.tokens == batch.sequences == len(batch.logits_rows) <= SIZES[-1]
            and batch.block_tables.shape[1] <= self._tables.shape[1]
        )

    def forward(self, batch: RaggedBatch) -> Tensor:
        """Logits [sequences, vocab] of a batch that it takes; they are the recording's own, and the next replay overwrites them.

        Raises NotRecordable.
        """
        size = next(size for size in SIZES if size >= batch.sequences)
        inputs = self._fill(batch, size)
        if size not in self._replays:
            self._replays[size] = self._record(lambda: self._compute(inputs))
        return self._replays[size]()[: batch.sequences]

    def _fill(self, batch: RaggedBatch, size: int) -> DecodeInputs:
        assert self._tables is not None, "who asks has asked takes()"
        if size not in self._inputs:
            self._inputs[size] = DecodeInputs(torch.zeros(3, size, dtype=torch.int64, device=self._device), self._tables[:size])
        inputs = self._inputs[size]
        rows = np.where(np.arange(size) < batch.sequences, np.arange(size), 0)
        tables, positions = batch.block_tables[rows], batch.positions[rows].astype(np.int64)
        blocks = tables[np.arange(size), positions // self._block_size]
        slots = blocks * np.int64(self._block_size) + positions % self._block_size
        ids = np.stack([batch.token_ids[rows].astype(np.int64), positions, slots])
        inputs.ids.copy_(move(torch.from_numpy(ids), self._device))
        inputs.tables[:, : tables.shape[1]].copy_(move(torch.from_numpy(tables), self._device))
        return inputs
