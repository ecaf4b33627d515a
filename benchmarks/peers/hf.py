"""transformers' `generate` in bf16: `python hf.py FOLDER THREADS`."""

import time

import torch
from contender import Tokens, serve, version
from transformers import AutoModelForCausalLM


class Transformers:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._path = path

    def load(self) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.bfloat16, local_files_only=True).eval()
        self.prefill([[1]])

    def prefill(self, prompts: list[Tokens]) -> None:
        self._prompts = torch.tensor(prompts)
        self._first = self._generate(1)

    def decode(self, steps: int) -> float:
        """`generate` reads the prompts again: what that took just before is taken off."""
        return self._generate(steps + 1) - self._first

    def _generate(self, tokens: int) -> float:
        started = time.perf_counter()
        mask = torch.ones_like(self._prompts)
        self._model.generate(
            self._prompts,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return time.perf_counter() - started


if __name__ == "__main__":
    serve(Transformers, version("transformers"))
