"""The native step of the Llama family as an executor: a whole step in one call, where it can run the model."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quantizers.kernels.cpu.sampling import Choice
from quantizers.kernels.cpu.step import BLOCK_SIZE, NativeStep
from server.engine import executor
from server.engine.executor import Int32, RaggedBatch


class NativeExecutor:
    """An `Executor` over `NativeStep`, which reads the model's weights in place: the model must be kept and not be changed."""

    name = "native-step"
    block_size = BLOCK_SIZE

    def __init__(self, model: nn.Module, *, cache_dtype: torch.dtype | None = None) -> None:
        """`cache_dtype`: int8, or None for the model's own. Raises InvalidInput where `why_not` does not answer None."""
        self._model, self._asked = model, cache_dtype
        self._step: NativeStep | None = NativeStep(model, cache_dtype)
        self.bytes_per_block = self._step.bytes_per_block
        self.cache_dtype: torch.dtype = self._step.cache_dtype
        self.held_bytes = self._step.bytes
        self.largest: Int32 | None = None

    @staticmethod
    def why_not(model: nn.Module) -> str | None:
        """Why the native step cannot run `model`; None where it can."""
        return NativeStep.supports(model)

    def allocate(self, num_blocks: int) -> None:
        if num_blocks == 0:
            if self._step is not None:
                self._step.close()
            self._step = None
            return
        if self._step is None:
            self._step = NativeStep(self._model, self._asked)
        self._step.allocate(num_blocks)

    def copy_block(self, src: int, dst: int) -> None:
        assert self._step is not None, "blocks are copied in a cache"
        self._step.copy_block(src, dst)

    def forward(self, batch: RaggedBatch) -> Tensor:
        assert self._step is not None, "a step needs a cache"
        logits = self._step.forward(batch.token_ids, batch.positions, batch.query_start, batch.block_tables, batch.logits_rows)
        self.largest = self._step.largest
        return logits

    def decode(self, batch: RaggedBatch, choices: Sequence[Choice], rounds: int, interrupted: ctypes.c_int32) -> Int32:
        assert self._step is not None, "a step needs a cache"
        return self._step.decode(batch.token_ids, batch.positions, batch.block_tables, choices, rounds, executor.AHEAD_SECONDS, interrupted)
