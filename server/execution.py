"""How a variant runs when it serves, for `quantizers.evaluate`: the engine's own executor, one window or one sequence at a time."""

import time

import torch
from torch import Tensor
from transformers import PretrainedConfig

from quantizers.model import LoadedModel
from server.engine.executor import Executor
from server.engine.interface import KvDtype
from server.engine.loading import kernels_of
from server.engine.runner import choose_executor
from server.engine.window import next_logits, window_logits

WARM_UP_TOKENS = 8


class ServedExecution:
    """A `quantizers.evaluate.Execution` over the executor that the engine would choose. It sets the model's attention for good."""

    def __init__(self, loaded: LoadedModel, config: PretrainedConfig, kv_dtype: KvDtype = "auto") -> None:
        self._executor: Executor = choose_executor(loaded.model, config, kv_dtype)
        self.kv_dtype = str(self._executor.cache_dtype).removeprefix("torch.")  # in effect
        self.kernels = kernels_of(loaded.kernels, self._executor)
        self._device = torch.device(loaded.model.device)

    def logits(self, window: Tensor) -> Tensor:
        """fp32 [tokens, vocabulary] of `window` int64 [tokens]."""
        return window_logits(self._executor, window.tolist())

    def decode_speed(self, prompt: Tensor, tokens: int) -> float:
        ids = prompt.tolist()
        token = int(window_logits(self._executor, ids, room=WARM_UP_TOKENS + tokens)[-1].argmax())
        started = time.perf_counter()
        for step in range(WARM_UP_TOKENS + tokens):
            if step == WARM_UP_TOKENS:
                started = self._now()
            token = int(next_logits(self._executor, [token], len(ids) + step)[-1].argmax())
        return tokens / (self._now() - started)

    def close(self) -> None:
        """Give the cache back."""
        self._executor.allocate(0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
