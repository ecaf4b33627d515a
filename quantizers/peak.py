"""How much memory a run of a recipe is going to take at its peak, said before it starts.

The peak lies inside the largest decoder block: its weights in fp32, the calibration tokens between two blocks, what lies between the
layers of a block for one chunk of tokens, and what the method holds. All of it is known from shapes.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quantizers.blocks import decoder_blocks, layer_shape
from quantizers.errors import OutOfMemory
from quantizers.flow import CHUNK_TOKENS
from quantizers.memory import LARGE_TENSOR
from quantizers.methods.base import LayerGroups, Method
from quantizers.methods.rtn import Rtn
from quantizers.mixed import SAMPLES as MIXED_SAMPLES
from quantizers.model import recipe_layers
from quantizers.products import in_onednn
from quantizers.recipe import Recipe
from quantizers.scheme import MixedScheme
from quantizers.skeleton import match_tensors, skeleton
from quantizers.tensors import TensorSource
from quantizers.weights import QuantizedScheme, tensor_specs

_FP32 = 4  # bytes
# What a process comes to hold besides tensors: the empty model, and what libraries make when they first run.
_PROCESS = 11 << 20
_LAID_OUT = 4  # tensors of a chunk's widest layer that oneDNN holds in layouts of its own where two streams run, measured
# What training keeps of a token: a layer's input in bf16 and what made it, its output; logits and log-probabilities of both models, and
# their gradients.
_KEPT_OF_INPUTS, _KEPT_OF_OUTPUTS, _LOGITS = 1.5, 1.0, 6
_ATTENTION = 8  # tensors of the hidden width that live at once inside of it
_KEPT = 12  # such tensors of a stream that the heap still holds after it ran through a block, where they are small


@dataclass(frozen=True)
class PeakBytes:
    """By what takes them. artifact: quantized tensors, where the sink keeps them in memory rather than in a file."""

    artifact: int
    block: int
    streams: int
    activations: int
    method: int
    process: int = _PROCESS

    @property
    def total(self) -> int:
        return self.artifact + self.block + self.streams + self.activations + self.method + self.process

    def facts(self) -> dict[str, int]:
        """What reports and manifests say."""
        parts = ("artifact", "block", "streams", "activations", "method", "process")
        return {**{name: getattr(self, name) for name in parts}, "total": self.total}


def predict_peak(
    config: PretrainedConfig,
    recipe: Recipe,
    source: TensorSource,
    *,
    samples: int = 0,
    length: int = 0,
    device: str = "cpu",
    keeps_artifact: bool = False,
) -> PeakBytes:
    """The peak of `quantizers.pipeline.quantize` above what the process holds before, for calibration tokens [samples, length].

    `keeps_artifact`: whether the sink keeps the quantized tensors in memory instead of a file. Raises as `skeleton`, `match_tensors` and
    `recipe_layers` do.
    """
    model = skeleton(config, torch.float32)
    return predict_peak_of(model, match_tensors(model, source), recipe, source, samples, length, device, keeps_artifact)


def predict_peak_of(
    model: PreTrainedModel,
    keys: Mapping[str, str],
    recipe: Recipe,
    source: TensorSource,
    samples: int,
    length: int,
    device: str,
    keeps_artifact: bool,
) -> PeakBytes:
    """The same with what was found already: the empty `model`, and which tensor of the source fills which of its parameters."""
    formats = recipe_layers(model, recipe)
    kept = keeps_artifact or recipe.has_finish  # until the whole is done nothing is written
    artifact = sum(_stored(scheme, *layer_shape(model.get_submodule(name))) for name, scheme in formats.items()) if kept else 0
    worst = PeakBytes(artifact, 0, 0, 0, 0)
    for prefix, block in decoder_blocks(model).items():
        shapes = {name: layer_shape(model.get_submodule(name)) for name in formats if name.startswith(f"{prefix}.")}
        inside = _Inside(model, block, shapes, recipe, samples, length)
        worst = max(worst, *inside.moments(artifact), key=lambda each: each.total)
    if recipe.has_finish:
        worst = max(worst, _whole(model, keys, source, recipe, samples, length, artifact), key=lambda each: each.total)
    if recipe.needs_calibration:
        worst = max(worst, _opening(model, keys, source, recipe, samples, length, device, artifact), key=lambda each: each.total)
    return worst


def _stored(scheme: QuantizedScheme | MixedScheme, rows: int, columns: int) -> int:
    if isinstance(scheme, MixedScheme):
        return int(scheme.bits * rows * columns / 8)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensor_specs(scheme, rows, columns).values())


def check_room(predicted: PeakBytes, available: int) -> None:
    """Raises OutOfMemory where the predicted peak is more than the `available` bytes."""
    if predicted.total > available:
        parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in predicted.facts().items() if name != "total" and size)
        raise OutOfMemory(
            f"quantizing is predicted to take {predicted.total / 1e6:.0f} MB at its peak ({parts}), and {available / 1e6:.0f} MB are free: "
            f"give fewer or shorter calibration samples, take a method that needs none, such as rtn, or free memory"
        )


class _Inside:
    """One decoder block."""

    def __init__(
        self, model: PreTrainedModel, block: nn.Module, shapes: Mapping[str, tuple[int, int]], recipe: Recipe, samples: int, length: int
    ) -> None:
        self._block = sum(parameter.numel() for parameter in block.parameters()) * _FP32
        self._recipe, self._shapes, self._samples = recipe, shapes, samples
        text = model.config.get_text_config(decoder=True)
        self._stream: int = samples * length * text.hidden_size * _FP32
        tokens = min(samples, max(1, CHUNK_TOKENS // length)) * length if samples else 0
        self._tokens = tokens
        widest = max((max(shape) for shape in shapes.values()), default=0)
        # Around a gated product lie four tensors of the inner width and three of the hidden one.
        hidden: int = tokens * text.hidden_size * _FP32
        self._widest: int = tokens * widest * _FP32
        product: int = 4 * self._widest + 3 * hidden
        self._chunk = product if hidden < LARGE_TENSOR else max(product, _ATTENTION * hidden)
        self._heap = _KEPT * hidden if hidden < LARGE_TENSOR else 0
        if model.config._attn_implementation == "eager":
            self._chunk += 2 * tokens * length * text.num_attention_heads * _FP32  # scores and their softmax, for all pairs of tokens

    def moments(self, artifact: int) -> list[PeakBytes]:
        """While tokens run through the block, and while the method works, for each method."""
        groups = _groups(self._shapes)
        found = []
        for method in self._methods():
            streams = method.streams()
            copies = _copies(method, self._recipe)
            activations, whole = self._chunk + len(streams) * self._heap if streams else 0, 0
            if len(streams) == 2:  # two runs side by side: the input of a layer in the first is kept, and weights before quantization
                activations += self._tokens * max((columns for _, columns in self._shapes.values()), default=0) * _FP32
                activations += _LAID_OUT * in_onednn() * self._widest
                whole = max((sum(rows * columns for rows, columns in group) for group in groups), default=0) * _FP32
            held, scratch = method.held_bytes(groups), method.scratch_bytes(groups)
            found.append(PeakBytes(artifact, self._block + whole, copies * self._stream, activations, held))
            found.append(PeakBytes(artifact, self._block + whole, copies * self._stream, self._trained(method), scratch))
        if isinstance(self._recipe.scheme, MixedScheme):
            found.append(self._measuring())
        return found

    def _trained(self, method: Method) -> int:
        """What the layers keep of one step's tokens for their gradients, and what a run holds beside it."""
        if not method.chunk_tokens:
            return 0
        return _kept_for_gradients(self._tokens, self._shapes.values()) + self._chunk + 2 * self._heap  # forwards and backwards

    def _methods(self) -> tuple[Method, ...]:
        methods = self._recipe.methods
        return (*methods, Rtn(name="rtn")) if methods[-1].role == "smoother" else methods

    def _measuring(self) -> PeakBytes:
        """Before anything is quantized widths are tried on a few samples: the block's input, two outputs and what compares them, weights
        kept beside the tried ones.
        """
        few = self._stream * min(self._samples, MIXED_SAMPLES) // max(1, self._samples)
        scratch = Rtn(name="rtn").scratch_bytes(_groups(self._shapes))
        return PeakBytes(0, 2 * self._block, 5 * few, self._chunk + self._heap, scratch)


def _copies(method: Method, recipe: Recipe) -> int:
    """Tensors of the size of a stream while `method` works: each stream that the recipe has, and what is made of it or kept of it."""
    kinds = frozenset(stream for each in recipe.methods for stream in each.streams())
    mine = method.streams()
    if mine == {"full"}:
        return len(kinds) + 1
    return len(kinds) + (2 if len(mine) == 2 else 1) if mine else len(kinds)


def _opening(
    model: PreTrainedModel,
    keys: Mapping[str, str],
    source: TensorSource,
    recipe: Recipe,
    samples: int,
    length: int,
    device: str,
    artifact: int,
) -> PeakBytes:
    """What stands before the blocks is in fp32 while it makes their first input."""
    blocks = tuple(f"{name}." for name in decoder_blocks(model))
    prefix = f"{model.base_model_prefix}."
    before = {key for name, key in keys.items() if name.startswith(prefix) and not name.startswith(blocks)}
    shapes = model.state_dict(keep_vars=True)
    size = sum(
        shapes[name].numel() * _FP32
        for name, key in keys.items()
        if key in before and name.startswith(prefix) and (device != "cpu" or source.dtype(key) != torch.float32)
    )
    if isinstance(recipe.scheme, MixedScheme) and not any(method.streams() for method in recipe.methods):
        samples = min(samples, MIXED_SAMPLES)
    hidden = model.config.get_text_config(decoder=True).hidden_size * _FP32
    return PeakBytes(artifact, size, samples * length * hidden, 3 * min(samples * length, CHUNK_TOKENS) * hidden, 0)


def _whole(
    model: PreTrainedModel, keys: Mapping[str, str], source: TensorSource, recipe: Recipe, samples: int, length: int, artifact: int
) -> PeakBytes:
    """While a method trains the whole model: what is not quantized in fp32, the streams that are left, and for one step's tokens the
    inputs of all blocks, what one of them keeps for its gradients, and some tensors of the size of the vocabulary.
    """
    method, text = recipe.methods[-1], model.config.get_text_config(decoder=True)
    shapes = {name: layer_shape(model.get_submodule(name)) for name in recipe_layers(model, recipe)}
    blocks = [{name: shape for name, shape in shapes.items() if name.startswith(f"{block}.")} for block in decoder_blocks(model)]
    inside = {name: shape for block in blocks for name, shape in block.items()}
    rest = {key for name, key in keys.items() if name.removesuffix(".weight") not in inside}
    unquantized = sum(torch.Size(source.shape(key)).numel() * _FP32 for key in rest if source.dtype(key) != torch.float32)
    tokens = min(samples, max(1, (method.chunk_tokens or CHUNK_TOKENS) // length)) * length if samples else 0
    kept = max(_kept_for_gradients(tokens, block.values()) for block in blocks) + len(blocks) * tokens * text.hidden_size * _FP32
    return PeakBytes(
        2 * artifact,
        unquantized,
        len(method.streams()) * samples * length * text.hidden_size * _FP32,
        kept + _LOGITS * tokens * text.vocab_size * _FP32,
        method.whole_bytes(sum(rows * columns for rows, columns in inside.values())),
    )


def _kept_for_gradients(tokens: int, shapes: Collection[tuple[int, int]]) -> int:
    return int(tokens * _FP32 * sum(_KEPT_OF_OUTPUTS * rows + _KEPT_OF_INPUTS * columns for rows, columns in shapes))


def _groups(shapes: Mapping[str, tuple[int, int]]) -> LayerGroups:
    """Layers of one module with as many inputs are taken to share them, as q, k and v do, and what the experts of a block read is one
    tensor: the data flow itself is known only later.
    """
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for name, (rows, columns) in shapes.items():
        parent, _, layer = name.rpartition(".")
        shared = parent if layer == "down_proj" else re.sub(r"\.experts\.\d+$", ".experts", parent)
        found.setdefault((shared, columns), []).append((rows, columns))
    return tuple(tuple(group) for group in found.values())
