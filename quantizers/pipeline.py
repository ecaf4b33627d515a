"""The walk over a checkpoint, one decoder block at a time: materialise a block, let the methods work, write what they chose, free it.

The peak is one block in fp32 and a layer's scratch space, whatever the size of the model; the quantized tensors leave through the sink.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quantizers.blocks import decoder_blocks, layer_shape, linear_layers
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.memory import PeakMemory, trim_heap
from quantizers.methods.rtn import quantize_nearest
from quantizers.model import recipe_layers
from quantizers.recipe import Recipe
from quantizers.scheme import FloatScheme
from quantizers.skeleton import match_tensors, put_tensor, skeleton
from quantizers.tensors import TensorSink, TensorSource
from quantizers.weights import QuantizedScheme, QuantizedWeight, join_rows

_ROWS = 4096  # of a matrix with a row for every token of the vocabulary: some megabytes at a time


@dataclass(frozen=True)
class Progress:
    """How far a run is. `seconds_left` is None until there is something to estimate it from."""

    stage: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True)
class LayerResult:
    name: str
    scheme: str
    kind: str  # the module's class in the checkpoint's own architecture
    relative_error: float  # ||w - w_quantized|| / ||w||, Frobenius; 0 for a weight of zeros
    bytes: int


@dataclass(frozen=True)
class QuantizationResult:
    """`bytes` is what went into the sink; `peak_bytes` the most that the run held beyond what the process held before, measured."""

    layers: tuple[LayerResult, ...]
    bytes: int
    seconds: float
    peak_bytes: int


class Block:
    """One decoder block in fp32, as a method sees it.

    `linears`: full name -> layer with real weights, `[out_features, in_features]` (GPT-2's transposed layers are shown as `nn.Linear`
    over the same memory). A method may change weights in place, and hands every layer over with `put`.
    """

    def __init__(
        self, name: str, module: nn.Module, scheme: QuantizedScheme, take: Callable[[str, QuantizedWeight, float, float], None]
    ) -> None:
        self.name = name
        self.module = module
        self.scheme = scheme
        self.linears = {full: _as_linear(layer) for full, layer in linear_layers(module, name).items()}
        self._take = take
        self._left = set(self.linears)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Hand over the quantized weight of the layer `name`; its error is taken against the weight that `linears[name]` holds now."""
        if name not in self._left:
            raise QuantizationFailed("was handed over twice or is no layer of this block", layer=name)
        self._left.remove(name)
        floating = self.linears[name].weight
        self._take(name, weight, _squares(floating - weight.dequantize()), _squares(floating))

    def check_complete(self) -> None:
        if self._left:
            raise QuantizationFailed(f"the method left {len(self._left)} layers of this block unquantized", layer=min(self._left))


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise QuantizationFailed("holds NaN or infinity: the checkpoint is damaged", layer=name)


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _as_linear(layer: nn.Module) -> nn.Linear:
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, Conv1D)
    rows, columns = layer_shape(layer)
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight.T, requires_grad=False)
    linear.bias = layer.bias
    return linear


def quantize(
    config: PretrainedConfig,
    source: TensorSource,
    recipe: Recipe,
    sink: TensorSink,
    *,
    device: str = "cpu",
    progress: Callable[[Progress], None] = lambda _: None,
    seed: int = 0,
) -> QuantizationResult:
    """Quantize the checkpoint `source` by `recipe`; every quantized tensor goes to `sink` as `<layer>.<tensor>`, on the CPU.

    Raises QuantizationFailed naming the layer or tensor at which it stopped, CorruptData where the checkpoint does not fit its config,
    InvalidInput for a baseline or an architecture without a stack of decoder blocks. What `progress` raises ends the run.
    """
    if isinstance(recipe.scheme, FloatScheme):
        raise InvalidInput(f"{recipe.slug} is a baseline: there is nothing to quantize, load it as it is", param="model")
    with PeakMemory(device) as peak, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        walk = _Walk(config, source, recipe, sink, torch.device(device), progress)
        walk.check_rest()
        walk.blocks()
        walk.head()
    return QuantizationResult(tuple(walk.results), sum(layer.bytes for layer in walk.results), walk.elapsed(), peak.bytes)


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
    ) -> None:
        self._started = time.monotonic()
        self._model = skeleton(config, torch.float32)
        self._keys = match_tensors(self._model, source)
        self._layers = recipe_layers(self._model, recipe)
        self._kinds = {name: type(self._model.get_submodule(name)).__name__ for name in self._layers}
        self._source, self._recipe, self._sink, self._device, self._progress = source, recipe, sink, device, progress
        self.results: list[LayerResult] = []

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def check_rest(self) -> None:
        """What is not quantized is served as it is, so it is checked too, before any work is done."""
        blocks = tuple(f"{name}." for name in decoder_blocks(self._model))
        for key in sorted({key for name, key in self._keys.items() if not name.startswith(blocks)}):
            for rows in torch.split(self._source.get(key), _ROWS):
                _check_finite(rows, key)

    def blocks(self) -> None:
        scheme = self._recipe.scheme
        assert not isinstance(scheme, FloatScheme)
        for name, module in decoder_blocks(self._model).items():
            self._materialise(name, module)
            block = Block(name, module, scheme, self._take)
            for method in self._recipe.methods:
                method.apply(block)
            block.check_complete()
            module.to("meta")
            del block
            trim_heap()

    def head(self) -> None:
        """The output matrix, some rows at a time: with a large vocabulary it is larger than a block."""
        if self._recipe.head is None:
            return
        name = next(reversed(self._layers))
        pieces, error, norm = [], 0.0, 0.0
        for rows in torch.split(self._source.get(self._keys[f"{name}.weight"]), _ROWS):
            weight = self._copy(rows, name)
            pieces.append(quantize_nearest(weight, self._recipe.head, layer=name))
            error += _squares(weight - pieces[-1].dequantize())
            norm += _squares(weight)
        self._take(name, join_rows(pieces), error, norm)

    def _materialise(self, prefix: str, module: nn.Module) -> None:
        for name in module.state_dict():
            full = f"{prefix}.{name}"
            put_tensor(self._model, full, self._copy(self._source.get(self._keys[full]), full))

    def _copy(self, tensor: Tensor, name: str) -> Tensor:
        """In fp32 on the device; a copy, since methods change weights and the source's may be a mapped file."""
        copy = tensor.to(device=self._device, dtype=torch.float32, copy=True)
        _check_finite(copy, name)
        return copy

    def _take(self, name: str, quantized: QuantizedWeight, error: float, norm: float) -> None:
        """Write a layer out and report it. `error` and `norm` are sums of squares."""
        relative = (error / norm if norm > 0 else error) ** 0.5
        if not relative < float("inf"):
            raise QuantizationFailed(f"its quantized weights are off by {relative}: the method produced no usable numbers", layer=name)
        for tensor_name, tensor in quantized.tensors.items():
            self._sink(f"{name}.{tensor_name}", tensor.cpu())
        self.results.append(LayerResult(name, quantized.scheme.slug, self._kinds[name], relative, quantized.bytes))
        done, total = len(self.results), len(self._layers)
        self._progress(Progress("quantize", done, total, self.elapsed() / done * (total - done)))
