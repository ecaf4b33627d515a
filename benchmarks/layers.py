"""What the native CPU kernels reach on this machine: bandwidth of each product, throughput of whole steps, and where a step's time goes.

    python -m benchmarks.layers [--model DIR] [--recipes SLUG...] [--threads N] [--rounds N] [--json]

Every figure is the best of several rounds, and the alternatives of one table take turns within a round, so that what else runs on the
machine hits them alike. A product's bandwidth is given beside that of a plain read of as many bytes, in the same round.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from model_store.formats.safetensors import SafetensorsSource
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.step import BLOCK_SIZE, NativeStep
from quantizers.memory import keep_freed_memory
from quantizers.model import LoadedModel, load_model
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.shared import SharedTensors
from quantizers.tensors import TensorSource

RECIPES = ("rtn-w4g32m-head8", "rtn-w4g32-head8", "rtn-w8g32-head8", "bf16")
DEMO = Path(__file__).parent.parent / ".cache" / "demo"
COLUMNS = 576  # of the demo model; a short row is the harder case
COLD_BYTES = 96 << 20  # three times the last-level cache of the machine that the figures in docs/ are from
FORMATS = {  # name -> kind, bits, group, zero of library.Matrix
    "w8g32": (library.GROUPED, 8, 32, 0),
    "w4g32": (library.GROUPED, 4, 32, 0),
    "w4g32z": (library.GROUPED, 4, 32, 1),
    "w4g32m": (library.GROUPED, 4, 32, 2),
    "w4g64": (library.GROUPED, 4, 64, 0),
    "w3g64": (library.GROUPED, 3, 64, 0),
    "w2g64": (library.GROUPED, 2, 64, 0),
    "w4g32a8": (library.GROUPED_TOKEN, 4, 32, 0),
    "w8a8": (library.TOKEN, 8, COLUMNS, 0),
    "nf4": (library.CODEBOOK, 4, 64, 0),
    "mxfp4": (library.CODEBOOK_POWER, 4, 32, 0),
    "nvfp4": (library.CODEBOOK_HALVES, 4, 32, 0),
    "fp8": (library.E4M3, 8, COLUMNS, 0),
    "bf16": (library.BF16, 16, COLUMNS, 0),
    "fp32": (library.FP32, 32, COLUMNS, 0),
}


class MemorySource(dict[str, Tensor]):
    """A `TensorSource` over tensors in memory: an artifact that is never written."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def get(self, name: str) -> Tensor:  # type: ignore[override]
        return self[name]


def best(rounds: int, alternatives: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the quickest run of each; they take turns."""
    seconds = dict.fromkeys(alternatives, float("inf"))
    for _ in range(rounds):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _matrix(kind: int, bits: int, group: int, zero: int) -> tuple[library.Matrix, Tensor]:
    """A matrix of COLD_BYTES with arbitrary codes and scales."""
    quantized = kind not in (library.BF16, library.FP32)
    matrix = library.Matrix(kind=kind, bits=bits, group=group, zero=zero, rows=16, columns=COLUMNS, data=0, bias=None)
    blocks = COLD_BYTES // (library.packed_bytes(matrix) if quantized else 16 * COLUMNS * bits // 8)
    matrix.rows = 16 * blocks
    memory = library.aligned_bytes(library.packed_bytes(matrix) if quantized else matrix.rows * COLUMNS * bits // 8)
    library.library().precis_advise_huge(memory.data_ptr(), memory.numel())
    memory.random_(56, 64)  # as fp16, bf16, e4m3 or a power of two: finite, and normal even when they are multiplied
    matrix.data = memory.data_ptr()
    return matrix, memory


def products(rounds: int) -> list[dict[str, Any]]:
    """One token against a matrix in memory, and 16 and 512 tokens against 6144 rows of it."""
    found = []
    for name, format_ in FORMATS.items():
        matrix, memory = _matrix(*format_)
        few = library.Matrix.from_buffer_copy(matrix)
        few.rows = min(6144, matrix.rows)
        inputs = {tokens: torch.randn(tokens, COLUMNS) for tokens in (1, 16, 512)}
        runs: dict[str, Callable[[], object]] = {
            "gemv": lambda matrix=matrix, x=inputs[1]: library.run_linear(matrix, x),  # type: ignore[misc]
            "read": lambda memory=memory: library.library().precis_read(memory.data_ptr(), memory.numel() // 8, library.threads()),  # type: ignore[misc]
            "16": lambda few=few, x=inputs[16]: library.run_linear(few, x),  # type: ignore[misc]
            "512": lambda few=few, x=inputs[512]: library.run_linear(few, x),  # type: ignore[misc]
        }
        seconds = best(rounds, runs)
        operations = 2 * few.rows * COLUMNS / 1e9
        row: dict[str, Any] = {"format": name, "megabytes": memory.numel() / 1e6}
        row |= {f"{run}_gb_per_s": memory.numel() / seconds[run] / 1e9 for run in ("gemv", "read")}
        row |= {f"gop_per_s_{tokens}_tokens": tokens * operations / seconds[str(tokens)] for tokens in (16, 512)}
        found.append(row)
    return found


def load(model: Path, slug: str) -> LoadedModel:
    source = SafetensorsSource(sorted(model.glob("*.safetensors")))
    return make(AutoConfig.from_pretrained(model), source, slug, "cpu", str(model))


def make(config: PretrainedConfig, source: TensorSource, slug: str, device: str, key: str) -> LoadedModel:
    """The variant `slug` of a checkpoint, quantized and loaded on `device`; its artifact is never written."""
    recipe, artifact = parse_recipe(slug), None
    if not recipe.is_baseline:
        artifact = MemorySource()
        quantize(config, source, recipe, artifact.__setitem__, device=device)
        keep_freed_memory()  # a server quantizes in another process; new pages for the logits of 16 sequences would be 5 % of a step
    return load_model(config, recipe, source, artifact, device=device, shared=SharedTensors(), checkpoint_key=key)


class Bench:
    """One variant's step with a cache that is filled once; a run repeats the same work."""

    CONTEXT, STREAMS = 1024, 16

    def __init__(self, model: Path, slug: str) -> None:
        self.loaded = load(model, slug)
        self.step = NativeStep(self.loaded.model)
        width = self.CONTEXT // BLOCK_SIZE
        self.step.allocate(width + self.STREAMS * (256 // BLOCK_SIZE))
        self.table = np.arange(width, dtype=np.int32)[None]
        self.tables = width + np.arange(self.STREAMS * (256 // BLOCK_SIZE), dtype=np.int32).reshape(self.STREAMS, -1)
        ids = np.random.default_rng(0).integers(0, self.step.vocab_size, self.CONTEXT).astype(np.int32)
        self.ids = ids
        self.prefill(self.CONTEXT)
        for stream in range(self.STREAMS):
            self.step.forward(ids[:128], _range(128), _ints(0, 128), self.tables[stream : stream + 1], _ints())

    def decode(self, position: int, tokens: int) -> None:
        """`tokens` steps of one token from `position` on."""
        for p in range(position, position + tokens):
            self.step.forward(self.ids[p : p + 1], _ints(p), _ints(0, 1), self.table, _ints(0))

    def prefill(self, tokens: int) -> None:
        self.step.forward(self.ids[:tokens], _range(tokens), _ints(0, tokens), self.table, _ints(tokens - 1))

    def streams(self, steps: int) -> None:
        """`steps` steps of STREAMS sequences at context 128."""
        count = self.STREAMS
        for p in range(128, 128 + steps):
            self.step.forward(self.ids[:count], np.full(count, p, np.int32), _range(count + 1), self.tables, _range(count))


def _ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def _range(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(count, dtype=np.int32)


WORK: dict[str, tuple[int, Callable[[Bench], object]]] = {  # name -> tokens of a run, the run
    "decode at 120": (16, lambda bench: bench.decode(112, 16)),
    "decode at 1000": (16, lambda bench: bench.decode(992, 16)),
    "prefill 512": (512, lambda bench: bench.prefill(512)),
    "16 streams": (64, lambda bench: bench.streams(4)),
}


def steps(model: Path, recipes: list[str], rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokens per second of each recipe and kind of work; and microseconds by phase of a decode step at each context."""
    benches = {slug: Bench(model, slug) for slug in recipes}
    seconds = {
        (slug, work): value
        for work, (_, run) in WORK.items()
        for slug, value in best(rounds, {slug: lambda bench=bench: run(bench) for slug, bench in benches.items()}).items()  # type: ignore[misc]  # noqa: B023
    }
    rates = [{"recipe": slug} | {work: tokens / seconds[slug, work] for work, (tokens, _) in WORK.items()} for slug in recipes]
    return rates, [_profile(slug, bench, work) for work in ("decode at 120", "decode at 1000") for slug, bench in benches.items()]


def _profile(slug: str, bench: Bench, work: str) -> dict[str, Any]:
    tokens, run = WORK[work]
    before = bench.step.profile()
    for _ in range(8):
        run(bench)
    after = bench.step.profile()
    return {"recipe": slug, "work": work} | {phase: (after[phase] - before[phase]) / (8 * tokens) * 1e6 for phase in after}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(
            *(
                f"{value:.0f}" if isinstance(value, float) and value >= 100 else f"{value:.1f}" if isinstance(value, float) else value
                for value in row.values()
            )
        )
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO, help="folder of a checkpoint of the Llama family")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates, phases = steps(options.model, options.recipes, options.rounds)
    found = {
        "machine": {"instruction_set": library.instruction_set(), "threads": options.threads, "rounds": options.rounds},
        "products": products(options.rounds),
        "tokens_per_second": rates,
        "microseconds_by_phase": phases,
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(found["machine"])
    for title in ("products", "tokens_per_second", "microseconds_by_phase"):
        show(title.replace("_", " "), found[title])  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
