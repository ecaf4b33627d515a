"""llama.cpp in process, through its C interface.

`python llamacpp.py MODEL.gguf THREADS` answers requests, `python llamacpp.py --convert SOURCE.gguf FOLDER` makes the formats.
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from contender import Tokens, serve, version

_GGML_Q8_0 = 8  # enum ggml_type
FORMATS = {
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
_CELLS, _SEQUENCES, _BATCH = 4096, 16, 512


class LlamaCpp:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._path, self._threads = path, threads
        self._model = self._context = None
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def load(self) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
        self._model = llama_cpp.llama_model_load_from_file(self._path.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = _CELLS, _BATCH, _BATCH, _SEQUENCES
        options.n_threads = options.n_threads_batch = self._threads
        options.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot load {self._path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.prefill([[1]])

    def prefill(self, prompts: list[Tokens]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._next = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), _BATCH):
                part = prompt[start : start + _BATCH]
                self._fill([(token, start + index, sequence, start + index == len(prompt) - 1) for index, token in enumerate(part)])
            self._next.append((self._greedy(self._batch.n_tokens - 1), len(prompt)))

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._fill([(token, position, sequence, True) for sequence, (token, position) in enumerate(self._next)])
            self._next = [(self._greedy(index), position + 1) for index, (_, position) in enumerate(self._next)]

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Run one batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def convert(source: str, folder: Path) -> None:
    """The same weights in each format; the tied embedding and output matrix at 8 bits in all that are quantized."""
    plain = folder / "BF16.gguf"
    for name, file_type in FORMATS.items():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = file_type, True
        if name != "BF16":
            options.token_embedding_type = options.output_tensor_type = _GGML_Q8_0
        part = folder / f"{name}.part"
        origin = source if name == "BF16" else str(plain)
        if llama_cpp.llama_model_quantize(origin.encode(), str(part).encode(), ctypes.byref(options)) != 0:
            raise SystemExit(f"llama.cpp cannot make {name} of {source}")
        part.rename(folder / f"{name}.gguf")


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(sys.argv[2], Path(sys.argv[3]))
    else:
        serve(LlamaCpp, version("llama-cpp-python"))
