"""What our kernels and recorded decode steps reach on a CUDA device, at the layer shapes of an 8B Llama, beside torch in bf16.

    python -m benchmarks.gpu [--formats w4g64 ...] [--recipes bf16 rtn-w4g64 ...] [--layers N] [--json FILE]

Products: the seven linear layers of a block, of so many blocks that no cache holds them, recorded as one CUDA graph, so that the time is
the device's alone; the figure is bytes of weights a second. Steps: random weights of `--layers` blocks, quantized on the device and run by
the engine's executor, with CUDA graphs and without. The bound of both is what a copy on the device moves.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.layers import MemorySource, make, show
from quantizers.kernels import LayerKind, select
from quantizers.scheme import parse_scheme
from quantizers.weights import QuantizedWeight, tensor_specs
from server.engine.decode_buckets import call_again
from server.engine.executor import Chunk, ragged_batch
from server.engine.hf_executor import BLOCK_SIZE, HfExecutor

DEVICE = torch.device("cuda", 0)
SHAPES = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))  # rows, columns
COLD_BYTES = 400 << 20  # several times the last-level cache
FORMATS = ("bf16", "w8", "w4g64", "w4g64z", "w4g64m", "w3g64", "w2g64", "nf4", "w8a8", "int8")
TOKENS = (1, 4, 16, 64, 512)
RECIPES = ("bf16", "rtn-w8", "rtn-w4g64", "bnb-nf4", "rtn-w8a8")
STREAMS = (1, 8, 32)
CONTEXT = 128


def recorded(run: Callable[[], object]) -> float:
    """Seconds of one replay of `run` as a CUDA graph: the median of twenty."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]  # type: ignore[no-untyped-call]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(sorted(begin.elapsed_time(end) for begin, end in marks)[10]) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * source.numel() / recorded(lambda: target.copy_(source))


Layer = tuple[Callable[[Tensor], Tensor], int, int]  # the product, its columns, bytes of its weight


def layers_of(slug: str) -> list[Layer]:
    """Of one block after another, until they are COLD_BYTES."""
    found: list[Layer] = []
    while sum(size for _, _, size in found) < COLD_BYTES:
        for rows, columns in SHAPES:
            found.append(_dense(rows, columns) if slug == "bf16" else _quantized(slug, rows, columns))
    return found


def _dense(rows: int, columns: int) -> Layer:
    weight = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    return (lambda x: torch.nn.functional.linear(x, weight)), columns, weight.nbytes


def _quantized(slug: str, rows: int, columns: int) -> Layer:
    scheme: Any = parse_scheme(slug)
    kernel = select(LayerKind(scheme, rows, columns, torch.bfloat16, DEVICE))
    tensors = {
        name: (torch.rand(shape, device=DEVICE) * 0.01).to(dtype) if dtype.is_floating_point else _codes(shape, dtype)
        for name, (shape, dtype) in tensor_specs(scheme, rows, columns).items()
    }
    buffers = kernel.prepare(QuantizedWeight(scheme, rows, columns, tensors))
    return (lambda x: kernel.run(x, buffers, None)), columns, sum(tensor.nbytes for tensor in buffers.values())


def _codes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 256, shape, device=DEVICE).to(torch.uint8).view(dtype)


def products(formats: list[str], bandwidth: float) -> list[dict[str, Any]]:
    """Of each format: GB of weights a second at each number of tokens; for one token, the share of the copy's rate."""
    rows = []
    for slug in formats:
        layers = layers_of(slug)
        size = sum(bytes_ for _, _, bytes_ in layers)
        row: dict[str, Any] = {"format": slug, "MB a block": size / len(layers) * len(SHAPES) / 1e6}
        for tokens in TOKENS:
            inputs = {columns: torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16) for _, columns in SHAPES}
            seconds = recorded(lambda: [run(inputs[columns]) for run, columns, _ in layers])  # noqa: B023
            row[f"us a block, {tokens}"] = seconds / len(layers) * len(SHAPES) * 1e6
            if tokens == 1:
                row |= {"GB/s, 1": size / seconds / 1e9, "% of a copy": 100 * size / seconds / bandwidth}
        rows.append(row)
    return rows


def source_of(layers: int) -> tuple[LlamaConfig, MemorySource]:
    """A checkpoint of random weights in memory."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return config, MemorySource({name: tensor.cpu() for name, tensor in model.state_dict().items()})


def step_seconds(executor: HfExecutor, streams: int) -> float:
    """Of one decode step with its logits, host included: the quickest of 30."""
    width = CONTEXT // BLOCK_SIZE + 1
    tables = [list(range(stream * width, (stream + 1) * width)) for stream in range(streams)]
    for table in tables:
        executor.forward(ragged_batch([Chunk(list(range(CONTEXT)), 0, table, 1)]))
    batch = ragged_batch([Chunk([5], CONTEXT, table, 0) for table in tables])
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        executor.forward(batch).argmax(-1).cpu()
        best = min(best, time.perf_counter() - begin)
    return best


def steps(recipes: list[str], layers: int, bandwidth: float) -> list[dict[str, Any]]:
    """Of each recipe: seconds to quantize and load, milliseconds of a step with graphs and without, and the rate at one stream."""
    config, source = source_of(layers)
    rows = []
    for slug in recipes:
        begin = time.perf_counter()
        model = make(config, source, slug, str(DEVICE), slug)
        row: dict[str, Any] = {"recipe": slug, "MB": sum(model.bytes.values()) / 1e6, "s to make": time.perf_counter() - begin}
        read = sum(model.bytes.values()) - 2 * config.vocab_size * config.hidden_size  # of the embedding, in bf16, a step reads a row
        for name, record in (("graph", None), ("eager", call_again)):
            executor = HfExecutor(model.model, config, record)
            executor.warm_up()
            executor.allocate(STREAMS[-1] * (CONTEXT // BLOCK_SIZE + 1))
            for streams in STREAMS:
                row[f"ms, {name} {streams}"] = step_seconds(executor, streams) * 1e3
            executor.allocate(0)
        row["% of a copy"] = 100 * read / (row["ms, graph 1"] / 1e3) / bandwidth
        model.close()
        torch.cuda.empty_cache()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model whose steps are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu: there is no CUDA device here; benchmarks.layers measures the CPU's kernels")
    bandwidth = copy_bandwidth()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__, "copy_gb_per_s": bandwidth / 1e9}
    print(found, flush=True)
    for title, rows in (("products", products(options.formats, bandwidth)), ("steps", steps(options.recipes, options.layers, bandwidth))):
        found[title] = rows
        if rows:
            show(title, rows)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
