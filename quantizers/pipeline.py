"""The walk over a checkpoint, one decoder block at a time: materialise a block, let the methods work, write what they chose, free it.

The peak is one block in fp32 and a layer's scratch space, whatever the size of the model, and for methods that need calibration what the
calibration tokens take inside one block; the quantized tensors leave through the sink.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quantizers.block import Block, BlockLoss, Training, one_format, squares
from quantizers.blocks import decoder_blocks, layer_shape
from quantizers.calibration import Calibration
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.finite import all_finite
from quantizers.flow import Streams, open_streams
from quantizers.memory import PeakMemory, keep_large_tensors_apart, memory_for, trim_heap
from quantizers.methods.base import Stream
from quantizers.methods.rtn import Rtn, quantize_nearest
from quantizers.mixed import SAMPLES as MIXED_SAMPLES
from quantizers.mixed import Offer, offers, spend
from quantizers.model import fill_computed_buffers, recipe_layers
from quantizers.peak import PeakBytes, check_room, predict_peak_of
from quantizers.products import quick_products
from quantizers.recipe import Recipe
from quantizers.scheme import FloatScheme, IntegerScheme, MixedScheme
from quantizers.skeleton import match_tensors, put_tensor, skeleton
from quantizers.tensors import TensorSink, TensorSource
from quantizers.training.whole import Whole
from quantizers.trial import check_formats, largest, try_layer
from quantizers.weights import QuantizedScheme, QuantizedWeight, join_rows

__all__ = ["Block", "LayerResult", "Progress", "QuantizationResult", "quantize"]

_QUICKLY_READ = 1 << 30  # weights: a second of reading
_PIECE = 1 << 20  # numbers of a matrix with a row for every token of the vocabulary that are looked at or rounded at once


@dataclass(frozen=True)
class Progress:
    """How far a run is. `seconds_left` is None until there is something to estimate it from."""

    stage: str
    done: int
    total: int
    seconds_left: float | None
    loss: float | None = None  # of the last step, where a method trains
    predicted_peak_bytes: int | None = None  # said once, with the first step


@dataclass(frozen=True)
class LayerResult:
    name: str
    scheme: str
    kind: str  # the module's class in the checkpoint's own architecture
    relative_error: float  # ||w - w_quantized|| / ||w||, Frobenius; 0 for a weight of zeros
    bytes: int


@dataclass(frozen=True)
class QuantizationResult:
    """`bytes` is what went into the sink; `peak_bytes` the most that the run held beyond what the process held before, measured.

    predicted_peak: the same as it was said before, by what takes it (`quantizers.peak.PeakBytes`). changed: full names of the unquantized
    tensors (norms, biases) that the methods changed. calibration: `Calibration.facts`.
    trained: what training came to, block by block.
    """

    layers: tuple[LayerResult, ...]
    bytes: int
    seconds: float
    peak_bytes: int
    predicted_peak_bytes: int
    predicted_peak: dict[str, int]
    changed: tuple[str, ...] = ()
    calibration: dict[str, str | int] | None = None
    trained: tuple[BlockLoss, ...] = ()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` cut along its first dimension, so that no piece is larger than one row or _PIECE."""
    if tensor.dim() == 0:
        return (tensor,)
    return torch.split(tensor, max(1, _PIECE // max(1, tensor[:1].numel())))


def _check_finite(tensor: Tensor, name: str) -> None:
    if not all_finite(tensor):
        raise QuantizationFailed("holds NaN or infinity: the checkpoint is damaged", layer=name)


def quantize(
    config: PretrainedConfig,
    source: TensorSource,
    recipe: Recipe,
    sink: TensorSink,
    *,
    calibration: Calibration | None = None,
    device: str = "cpu",
    progress: Callable[[Progress], None] = lambda _: None,
    seed: int = 0,
    checkpoints: Path | None = None,
    memory_limit: int | None = None,
    keeps_artifact: bool = False,
) -> QuantizationResult:
    """Quantize the checkpoint `source` by `recipe`; every quantized tensor goes to `sink` as `<layer>.<tensor>`, on the CPU, and every
    other tensor of a block that a method changed, whole and in fp32, by its own name. Methods that train keep their checkpoints in the
    folder `checkpoints`, if there is one, and go on from those that they find there.

    memory_limit: bytes that the run may take beyond what the process holds now. keeps_artifact: whether `sink` keeps tensors in memory.

    Raises OutOfMemory where it is predicted to take more or an allocation fails, QuantizationFailed naming the layer or tensor at which it
    stopped, CorruptData where the checkpoint does not fit its config, InvalidInput for a baseline, an architecture without a stack of
    decoder blocks, calibration tokens that are missing, that no method looks at or that the model has no place for. What `progress`
    raises ends the run.
    """
    if isinstance(recipe.scheme, FloatScheme):
        raise InvalidInput(f"{recipe.slug} is a baseline: there is nothing to quantize, load it as it is", param="model")
    _check_calibration(config, recipe, calibration)
    keep_large_tensors_apart(tokens_flow=recipe.needs_calibration)
    trim_heap()  # what was freed before would hide the run's own peak
    with PeakMemory(device) as peak, torch.random.fork_rng(), torch.no_grad(), quick_products():
        torch.manual_seed(seed)
        walk = _Walk(config, source, recipe, sink, torch.device(device), progress, checkpoints)
        predicted = walk.predict(calibration, keeps_artifact)
        if memory_limit is not None:
            check_room(predicted, memory_limit)
        walk.check()
        walk.try_largest(0 if calibration is None else int(calibration.mask.sum()))
        if calibration is not None and isinstance(recipe.scheme, MixedScheme):
            walk.give_widths(calibration.first(MIXED_SAMPLES), recipe.scheme)
        wanted = frozenset[Stream](stream for method in recipe.methods for stream in method.streams())
        streams = walk.streams(calibration, wanted) if calibration is not None and wanted else None
        walk.blocks(streams)
        if calibration is not None and streams is not None and recipe.has_finish:
            walk.whole(calibration, streams)
        walk.rest()
    return QuantizationResult(
        tuple(walk.results),
        walk.bytes,
        walk.elapsed(),
        peak.bytes,
        predicted.total,
        predicted.facts(),
        tuple(walk.changed),
        calibration.facts if calibration else None,
        tuple(walk.trained),
    )


def _check_calibration(config: PretrainedConfig, recipe: Recipe, calibration: Calibration | None) -> None:
    if calibration is None:
        if recipe.needs_calibration:
            raise InvalidInput(f"{recipe.slug} needs calibration tokens: give some", param="calibration")
        return
    if not recipe.needs_calibration:
        raise InvalidInput(f"{recipe.slug} looks at no calibration tokens: leave them out", param="calibration")
    text = config.get_text_config(decoder=True)
    check_length(config, calibration.tokens.shape[1])
    low, high = int(calibration.tokens.min()), int(calibration.tokens.max())
    if low < 0 or high >= text.vocab_size:
        raise InvalidInput(
            f"the calibration tokens hold the id {low if low < 0 else high}, the vocabulary has 0 to {text.vocab_size - 1}: "
            "cut them with the model's own tokenizer",
            param="calibration",
        )


def check_length(config: PretrainedConfig, length: int) -> None:
    """Raises InvalidInput where samples of `length` tokens are longer than the model's context."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise InvalidInput(f"calibration samples of {length} tokens are longer than the model's {longest}: shorten them", param="length")


class _Walk:
    """One run's state."""

    def __init__(
        self,
        config: PretrainedConfig,
        source: TensorSource,
        recipe: Recipe,
        sink: TensorSink,
        device: torch.device,
        progress: Callable[[Progress], None],
        checkpoints: Path | None,
    ) -> None:
        self._started = time.monotonic()
        self._model = skeleton(config, torch.float32, every_token=True)
        self._keys = match_tensors(self._model, source)
        self._layers = recipe_layers(self._model, recipe)
        self._inside = tuple(f"{name}." for name in decoder_blocks(self._model))
        self._kinds = {name: type(self._model.get_submodule(name)).__name__ for name in self._layers}
        self._source, self._recipe, self._sink, self._device, self._progress = source, recipe, sink, device, progress
        self.results: list[LayerResult] = []
        self._checkpoints = checkpoints
        self._waiting: dict[str, tuple[QuantizedWeight, float, float]] = {}  # for a method's work on the whole model
        self._floating: dict[str, Tensor] = {}  # what it makes them from, fp32 [out, in]
        self._changed_to: dict[str, Tensor] = {}  # norms and biases that it needs then: vectors
        self.changed: list[str] = []
        self.trained: list[BlockLoss] = []
        self.bytes = 0

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def predict(self, calibration: Calibration | None, keeps_artifact: bool) -> PeakBytes:
        """The peak of this run, and the first thing that its progress says."""
        samples, length = (0, 0) if calibration is None else calibration.tokens.shape
        device = self._device.type
        predicted = predict_peak_of(self._model, self._keys, self._recipe, self._source, samples, length, device, keeps_artifact)
        self._progress(Progress("try", 0, len(self._layers), None, predicted_peak_bytes=predicted.total))
        return predicted

    def check(self) -> None:
        """Formats, and that what is not quantized holds numbers: it is served as it is. Weights too where reading all takes a second."""
        shapes = {name: layer_shape(self._model.get_submodule(name)) for name in self._layers}
        check_formats(self._layers, shapes)
        everything = sum(torch.Size(self._source.shape(key)).numel() for key in set(self._keys.values())) <= _QUICKLY_READ
        blocks = tuple(f"{name}." for name in decoder_blocks(self._model))
        names = {key: name for name, key in reversed(self._keys.items()) if everything or not name.startswith(blocks)}
        for key, name in sorted(names.items()):
            for rows in _pieces(self._source.get(key)):
                _check_finite(rows, name)

    def try_largest(self, tokens: int) -> None:
        """Before the first block, quantize the largest layer on made-up inputs: what cannot succeed fails at once."""
        blocks = tuple(f"{name}." for name in decoder_blocks(self._model))
        shapes = {name: layer_shape(self._model.get_submodule(name)) for name in self._layers if name.startswith(blocks)}
        if not shapes:
            return
        name = largest(shapes)
        layer, scheme = self._model.get_submodule(name), self._layers[name]
        self._materialise(name, layer)
        widest = max(scheme.choices, key=lambda each: each.weight_bits) if isinstance(scheme, MixedScheme) else scheme
        methods = self._recipe.methods
        rounding = (Rtn(name="rtn"),) if methods[-1].role == "smoother" else ()
        try_layer(name, layer, widest, (*methods, *rounding), tokens)
        layer.to("meta")
        trim_heap()

    def give_widths(self, calibration: Calibration, scheme: MixedScheme) -> None:
        """Look at every block once before the first is quantized, and spend the budget."""
        streams = self.streams(calibration, frozenset(("full",)))
        stack = decoder_blocks(self._model)
        groups: dict[tuple[str, ...], list[Offer]] = {}
        for index, (name, module) in enumerate(stack.items()):
            self._materialise(name, module)
            block = Block(name, module, {}, self._take, index=index, streams=streams)
            groups |= offers(block, index, streams, self._layers)
            self._free(f"{name}.{tensor}" for tensor in module.state_dict())
            trim_heap()
            self._progress(Progress("measure", index + 1, len(stack), self.elapsed() / (index + 1) * (len(stack) - index - 1)))
        weights = sum(rows * columns for rows, columns in self._shapes(name for names in groups for name in names))
        self._layers |= spend(scheme.bits * weights, groups)

    def streams(self, calibration: Calibration, wanted: frozenset[Stream]) -> Streams:
        """The inputs of the first block, made by the model itself, whose part before the blocks is in memory meanwhile."""
        blocks = decoder_blocks(self._model)
        fill_computed_buffers(self._model, self._device)
        inside = tuple(f"{name}." for name in blocks)
        before = [name for name in self._keys if name.startswith(f"{self._model.base_model_prefix}.") and not name.startswith(inside)]
        for name in before:
            put_tensor(self._model, name, self._source.get(self._keys[name]).to(device=self._device, dtype=torch.float32))
        tokens, mask = calibration.tokens.to(self._device), calibration.mask.to(self._device)
        chunk = min((method.chunk_tokens for method in self._recipe.methods if method.chunk_tokens), default=None)
        streams = open_streams(self._model, list(blocks.values()), tokens, mask, wanted, chunk_tokens=chunk)
        self._free(before)
        trim_heap()
        return streams

    def blocks(self, streams: Streams | None) -> None:
        stack = decoder_blocks(self._model)
        for index, (name, module) in enumerate(stack.items()):
            self._materialise(name, module)
            training = Training(self._checkpoints, partial(self._trains, index, len(stack)), self.trained.append)
            block = Block(name, module, self._given(), self._take, index=index, streams=streams, training=training)
            if index == 0:
                self._compare_formats(block, stack)
            with memory_for(name):
                for method in self._recipe.methods:
                    if method.keeps_floating:
                        self._floating |= {name: block.linears[name].weight.detach().clone() for name in block.schemes}
                    method.apply(block)
                if self._recipe.methods[-1].role == "smoother":
                    Rtn(name="rtn").apply(block)
            last = index == len(stack) - 1
            block.finish(last=last)
            if last and streams is not None and self._recipe.has_finish:
                streams.full = block.expected()
            self._write_changed(name, module, set(block.schemes))
            self._free(f"{name}.{tensor}" for tensor in module.state_dict())
            del block
            trim_heap()

    def whole(self, calibration: Calibration, streams: Streams) -> None:
        """All blocks are quantized: let the last method work on the model as a whole, and write what it leaves."""
        weights = {name: weight for name, (weight, _, _) in self._waiting.items()}
        rest = [name for name in self._keys if name.removesuffix(".weight") not in weights]
        for name in rest:
            tensor = self._changed_to[name] if name in self._changed_to else self._source.get(self._keys[name])
            put_tensor(self._model, name, tensor.to(device=self._device, dtype=torch.float32))
        assert streams.full is not None, "the method asks for the full stream"
        whole = Whole(
            self._model,
            tuple(decoder_blocks(self._model).values()),
            weights,
            self._floating,
            calibration.tokens.to(self._device),
            calibration.mask.to(self._device),
            streams.full,
            streams.chunks,
            streams.in_tuple,
            Training(self._checkpoints, self._trains_whole, self.trained.append),
        )
        with memory_for("the whole model"):
            finished = self._recipe.methods[-1].finish(whole)
        self._free(rest)
        self._floating.clear()
        del whole
        trim_heap()
        waiting, self._waiting = self._waiting, {}
        for name, (before, error, norm) in waiting.items():
            assert finished[name].scheme == before.scheme
            if len(self._recipe.methods) == 1:  # a transform before it has changed what the error is counted from
                original = self._original(name)
                error, norm = squares(original - finished[name].dequantize()), squares(original)
            self._write_layer(name, finished[name], error, norm)

    def _trains_whole(self, step: int, steps: int, loss: float, left: float) -> None:
        self._progress(Progress("train", step, steps, left, loss=loss))

    def _original(self, name: str) -> Tensor:
        """The checkpoint's own weight of a layer, fp32 [out, in]."""
        weight = self._copy(self._source.get(self._keys[f"{name}.weight"]), name)
        return weight.T if isinstance(self._model.get_submodule(name), Conv1D) else weight

    def _trains(self, index: int, blocks: int, step: int, steps: int, loss: float, _left: float) -> None:
        """Training is what takes long: the share of the run is that of the steps."""
        done, total = index * steps + step, blocks * steps
        self._progress(Progress("train", done, total, self.elapsed() / done * (total - done), loss=loss))

    def _compare_formats(self, first: Block, stack: Iterable[str]) -> None:
        """Layers that share an input in the first block do so in all of them: one format, which the last block is not to find out."""
        given = self._given()
        for group in first.groups:
            for prefix in stack:
                one_format([prefix + name.removeprefix(first.name) for name in group.names], given)

    def _shapes(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        return (layer_shape(self._model.get_submodule(name)) for name in names)

    def _given(self) -> dict[str, QuantizedScheme]:
        """Every layer's format, now that none is a budget any more."""
        return {name: scheme for name, scheme in self._layers.items() if not isinstance(scheme, MixedScheme)}

    def rest(self) -> None:
        """Embedding and output matrix, where they are quantized."""
        blocks = tuple(f"{name}." for name in decoder_blocks(self._model))
        for name, scheme in self._layers.items():
            if not name.startswith(blocks):
                assert isinstance(scheme, IntegerScheme), "what lies outside the blocks is rounded to nearest"
                self._by_rows(name, scheme)

    def _by_rows(self, name: str, scheme: IntegerScheme) -> None:
        """Some rows at a time: with a large vocabulary such a matrix is larger than a block."""
        pieces, error, norm = [], 0.0, 0.0
        for rows in _pieces(self._source.get(self._keys[f"{name}.weight"])):
            weight = self._copy(rows, name)
            pieces.append(quantize_nearest(weight, scheme, layer=name))
            error += squares(weight - pieces[-1].dequantize())
            norm += squares(weight)
        self._take(name, join_rows(pieces), error, norm)

    def _materialise(self, prefix: str, module: nn.Module) -> None:
        for name in module.state_dict():
            full = f"{prefix}.{name}"
            put_tensor(self._model, full, self._copy(self._source.get(self._keys[full]), full))

    def _free(self, names: Iterable[str]) -> None:
        """Forget tensors of the checkpoint. What the model computed for itself stays: it does that only once."""
        for name in names:
            put_tensor(self._model, name, torch.empty(self._source.shape(self._keys[name]), device="meta"))

    def _copy(self, tensor: Tensor, name: str) -> Tensor:
        """In fp32 on the device; a copy, since methods change weights and the source's may be a mapped file."""
        copy = tensor.to(device=self._device, dtype=torch.float32, copy=True)
        _check_finite(copy, name)
        return copy

    def _write_changed(self, prefix: str, module: nn.Module, quantized: set[str]) -> None:
        """Whatever a method changed besides the weights that it quantized."""
        if not any(method.changes_unquantized for method in self._recipe.methods):
            return
        for name, tensor in module.state_dict(prefix=f"{prefix}.").items():
            if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
                continue
            if not torch.equal(tensor.cpu(), self._source.get(self._keys[name]).float()):
                _check_finite(tensor, name)
                self._write(name, tensor)
                self.changed.append(name)
                if self._recipe.has_finish:
                    self._changed_to[name] = tensor.cpu().clone()

    def _write(self, name: str, tensor: Tensor) -> None:
        self.bytes += tensor.nbytes
        self._sink(name, tensor.cpu())

    def _take(self, name: str, quantized: QuantizedWeight, error: float, norm: float) -> None:
        """A layer that a method handed over. `error` and `norm` are sums of squares."""
        if self._recipe.has_finish and name.startswith(self._inside):
            self._waiting[name] = (quantized, error, norm)
        else:
            self._write_layer(name, quantized, error, norm)
        trim_heap()
        done, total = len(self.results) + len(self._waiting), len(self._layers)
        self._progress(Progress("quantize", done, total, self.elapsed() / done * (total - done)))

    def _write_layer(self, name: str, quantized: QuantizedWeight, error: float, norm: float) -> None:
        """Write a layer out and report it."""
        relative = (error / norm if norm > 0 else error) ** 0.5
        if not relative < float("inf"):
            raise QuantizationFailed(f"its quantized weights are off by {relative}: the method produced no usable numbers", layer=name)
        for tensor_name, tensor in quantized.tensors.items():
            self._write(f"{name}.{tensor_name}", tensor)
        self.results.append(LayerResult(name, quantized.scheme.slug, self._kinds[name], relative, quantized.bytes))
