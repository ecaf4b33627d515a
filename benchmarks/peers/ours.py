"""Precis in process: `python ours.py CHECKPOINT:RECIPE THREADS`. The artifact is made once, beside the checkpoint's name in the cache."""

from pathlib import Path

import numpy as np
import torch
from contender import Tokens, serve
from transformers import AutoConfig

from model_store.formats.safetensors import SafetensorsSource
from quantizers.kernels.cpu.step import BLOCK_SIZE, NativeStep
from quantizers.model import load_model
from quantizers.recipe import parse_recipe
from quantizers.shared import SharedTensors

_SEQUENCES, _BLOCKS = 16, 1280 // BLOCK_SIZE  # a sequence


class Precis:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        checkpoint, self._slug, artifact = path.split(":")
        self._checkpoint, self._artifact = Path(checkpoint), Path(artifact) if artifact else None
        width = _BLOCKS
        self._tables = np.arange(_SEQUENCES * width, dtype=np.int32).reshape(_SEQUENCES, width)

    def load(self) -> None:
        config, recipe = AutoConfig.from_pretrained(self._checkpoint), parse_recipe(self._slug)
        source = SafetensorsSource(sorted(self._checkpoint.glob("*.safetensors")))
        artifact = SafetensorsSource(sorted(self._artifact.glob("*.safetensors"))) if self._artifact else None
        self._loaded = load_model(config, recipe, source, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="")
        self._step = NativeStep(self._loaded.model)
        self._step.allocate(self._tables.size)
        self.prefill([[1]])

    def prefill(self, prompts: list[Tokens]) -> None:
        self._tokens = np.zeros(len(prompts), np.int32)
        self._positions = np.zeros(len(prompts), np.int32)
        for index, prompt in enumerate(prompts):
            count = len(prompt)
            logits = self._step.forward(
                np.array(prompt, np.int32),
                _range(count),
                np.array([0, count], np.int32),
                self._tables[index : index + 1],
                _range(count)[-1:],
            )
            self._tokens[index], self._positions[index] = int(logits[0].argmax()), count

    def decode(self, steps: int) -> None:
        count = len(self._tokens)
        tables, starts, rows = self._tables[:count], _range(count + 1), _range(count)
        for _ in range(steps):
            logits = self._step.forward(self._tokens, self._positions, starts, tables, rows)
            self._tokens = logits.numpy().argmax(-1).astype(np.int32)  # the threads of torch's would spin beside the next step
            self._positions += np.int32(1)


def _range(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


if __name__ == "__main__":
    serve(Precis, "precis")
