"""How a variant runs when it serves, for `quantizers.evaluate`: the engine's own executor, one window or one sequence at a time."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from quantizers.model import LoadedModel
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.loading import kernels_of
from server.engine.runner import choose_executor

STEP_TOKENS = 128  # of a window: what of a prompt the engine computes beside running streams
WARM_UP_TOKENS = 8


class ServedExecution:
    """A `quantizers.evaluate.Execution` over the executor that the engine would choose. It sets the model's attention for good."""

    def __init__(self, loaded: LoadedModel, config: PretrainedConfig) -> None:
        self._executor: Executor = choose_executor(loaded.model, config)
        self.kernels = kernels_of(loaded.kernels, self._executor)
        self._device = torch.device(loaded.model.device)

    def logits(self, window: Tensor) -> Tensor:
        """fp32 [tokens, vocabulary] of `window` int64 [tokens]."""
        return torch.cat(self._prefill(window.tolist(), decode_tokens=0))

    def decode_speed(self, prompt: Tensor, tokens: int) -> float:
        ids = prompt.tolist()
        token = int(self._prefill(ids, decode_tokens=WARM_UP_TOKENS + tokens)[-1][-1].argmax())
        started = time.perf_counter()
        for step in range(WARM_UP_TOKENS + tokens):
            if step == WARM_UP_TOKENS:
                started = self._now()
            token = int(self._forward([token], len(ids) + step)[-1].argmax())
        return tokens / (self._now() - started)

    def close(self) -> None:
        """Give the cache back."""
        self._executor.allocate(0)

    def _prefill(self, ids: Sequence[int], decode_tokens: int) -> list[Tensor]:
        """Logits of all `ids`, step by step, into a new cache with room for so many tokens after them."""
        self._blocks = -(-(len(ids) + decode_tokens) // self._executor.block_size)
        self._executor.allocate(self._blocks)
        starts = range(0, len(ids), STEP_TOKENS)
        return [self._forward(ids[start : start + STEP_TOKENS], start) for start in starts]

    def _forward(self, ids: Sequence[int], start: int) -> Tensor:
        return self._executor.forward(ragged_batch([Chunk(ids, start, range(self._blocks), 0)]))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
