"""What methods lose, method against method: KL to the checkpoint's fp32 on held-out text, in fp32 arithmetic and as it is served.

    python benchmarks/quality.py CHECKPOINT_DIR rtn-w4g64 gptq-w4g64 ... [--json FILE] [--plot FILE.svg]

`fp32` puts the dequantized weights into the model's own fp32 layers (int8 tokens are rounded before the product), which is what another
library's simulated quantization computes: the numbers of two libraries differ by the method alone. `served` loads the same artifact as
the server does, bf16 and the kernels of this machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from model_store.formats.safetensors import SafetensorsSource
from quantizers.block import executed_tokens
from quantizers.calibration import calibrate_on, calibration_text, evaluation_text, token_windows
from quantizers.errors import PrecisError
from quantizers.evaluate import evaluate
from quantizers.memory import trim_heap
from quantizers.model import LoadedModel, load_model, stored_layers
from quantizers.pipeline import QuantizationResult, quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.report import Report
from quantizers.scheme import IntegerScheme
from quantizers.shared import SharedTensors
from quantizers.skeleton import put_tensor, skeleton
from quantizers.tensors import TensorSource
from quantizers.weights import QuantizedWeight, tensor_specs
from server.console import bar
from server.offline import shares
from server.text.tokenizer import Tokenizer

LENGTH = 512


class Artifact(dict[str, torch.Tensor]):
    """A variant's tensors in memory: the sink of the walk, and a source for the loader."""

    def keys(self) -> Collection[str]:  # type: ignore[override]
        return list(super().keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def get(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return self[name]


def main() -> int:
    """Prints a line a recipe as it is done, then a table. Exit status 2 where a recipe or the checkpoint is wrong."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        rows = measure(arguments)
    except PrecisError as error:
        print(f"quality: {error.message}", file=sys.stderr)
        return 2
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what quantization methods lose.")
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, tokenizer and model.safetensors")
    parser.add_argument("recipes", nargs="+", help="such as rtn-w4g64 gptq-w4g64")
    parser.add_argument("--samples", type=int, default=64, help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("--windows", type=int, default=24, help=f"evaluation windows of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--only-fp32", action="store_true", help="leave the serving kernels out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a recipe: recipe, seconds, peak_mb, artifact_mb, bits_per_weight, and `fp32` and `served` with kl, kl_p99, perplexity, top1."""
    folder: Path = arguments.checkpoint
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    source = SafetensorsSource(sorted(folder.glob("*.safetensors")))
    encode = Tokenizer(folder).encode_now
    windows = token_windows(encode, evaluation_text(), length=LENGTH, count=arguments.windows)
    reference = load_fp32(config, source)
    rows = []
    for slug in arguments.recipes:
        recipe = parse_recipe(slug)
        calibration = (
            calibrate_on(encode, calibration_text(), samples=arguments.samples, length=LENGTH) if recipe.needs_calibration else None
        )
        artifact = Artifact()
        trim_heap()  # what earlier models left behind would hide the run's own peak
        started = time.monotonic()
        with bar(recipe.slug) as show:
            sink, progress = artifact.__setitem__, shares(show)
            result = quantize(config, source, recipe, sink, calibration=calibration, progress=progress, keeps_artifact=True)
        row = _facts(recipe, result, time.monotonic() - started)
        models = {"fp32": load_dequantized(config, source, recipe, artifact)}
        if not arguments.only_fp32:
            models["served"] = load_model(config, recipe, source, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="")
        reports = evaluate(reference.model, models, windows, evaluation_text(), decode_tokens=1)
        row |= {name: _quality(report) for name, report in reports.items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
        for model in models.values():
            model.close()
    return rows


def load_fp32(config: PretrainedConfig, source: TensorSource) -> LoadedModel:
    return load_model(config, parse_recipe("fp32"), source, None, device="cpu", shared=SharedTensors(), checkpoint_key="")


def load_dequantized(config: PretrainedConfig, source: TensorSource, recipe: Recipe, artifact: Artifact) -> LoadedModel:
    """The fp32 model with the artifact's weights in its own layers; layers with int8 tokens round their input first."""
    loaded = load_fp32(config, source)
    layers = stored_layers(skeleton(config, torch.float32), recipe, artifact)
    taken = set()
    for name, scheme in layers.items():
        layer = loaded.model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear), "the benchmark's checkpoints are of the Llama family"
        tensors = {tensor: artifact[f"{name}.{tensor}"] for tensor in tensor_specs(scheme, layer.out_features, layer.in_features)}
        taken |= {f"{name}.{tensor}" for tensor in tensors}
        weight = QuantizedWeight(scheme, layer.out_features, layer.in_features, tensors).dequantize()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if isinstance(scheme, IntegerScheme) and scheme.activation_bits:
            layer.register_forward_pre_hook(lambda _, args: (executed_tokens(args[0]),))
    for name in set(artifact) - taken:
        put_tensor(loaded.model, name, artifact[name].float())
    return loaded


def _facts(recipe: Recipe, result: QuantizationResult, seconds: float) -> dict[str, Any]:
    return {
        "recipe": recipe.slug,
        "seconds": round(seconds, 1),
        "peak_mb": round(result.peak_bytes / 1e6),
        "predicted_peak_mb": round(result.predicted_peak_bytes / 1e6),
        "artifact_mb": round(result.bytes / 1e6, 1),
        "worst_layer_error": round(max(layer.relative_error for layer in result.layers), 4),
    }


def _quality(report: Report) -> dict[str, Any]:
    return {
        "kl": round(report.kl_divergence, 5),
        "kl_p99": round(report.kl_divergence_p99, 4),
        "perplexity": round(report.perplexity, 3),
        "top1": round(report.top1_agreement, 4),
        "kernels": report.kernels,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| recipe | KL (fp32) | KL (served) | perplexity | top-1 | MB | s | peak MB |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        served = row.get("served")
        lines.append(
            f"| {row['recipe']} | {row['fp32']['kl']:.5f} | {served['kl'] if served else '-'} | {row['fp32']['perplexity']:.2f} "
            f"| {row['fp32']['top1']:.1%} | {row['artifact_mb']} | {row['seconds']} | {row['peak_mb']} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL over the artifact's bytes; a hollow mark is the same artifact through the serving kernels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        point = (row["artifact_mb"], row["fp32"]["kl"])
        axes.scatter(*point, s=30, color="tab:blue")
        if "served" in row:
            axes.scatter(row["artifact_mb"], row["served"]["kl"], s=45, facecolors="none", edgecolors="tab:orange")
        axes.annotate(row["recipe"], point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="MB of quantized layers", ylabel="KL to fp32, nats a token", yscale="log")
    axes.margins(x=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
