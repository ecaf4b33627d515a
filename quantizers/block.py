"""One decoder block in fp32, as a method sees it: its layers, which of them share an input, and the calibration tokens that run through."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantizers.activations import quantize_tokens
from quantizers.blocks import layer_shape, linear_layers
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.flow import Chunk, Group, Streams, find_groups
from quantizers.memory import trim_heap
from quantizers.methods.base import Method, Stream
from quantizers.replay import Replay
from quantizers.weights import QuantizedScheme, QuantizedWeight

See = Callable[[Group, Tensor], None]
SeeBoth = Callable[[Group, Tensor, Tensor | None], None]
Choose = Callable[[Group], Mapping[str, QuantizedWeight]]
Take = Callable[[str, QuantizedWeight, float, float], None]


@dataclass(frozen=True)
class BlockLoss:
    """The error of a block's output, mean over tokens of ||y' - y||^2 / ||y||^2, with weights rounded for good, before training and after:
    on the tokens that it trained on and on those that were held back. kept: whether the trained weights were the better ones.
    """

    block: str
    steps: int
    before: float
    after: float
    held_before: float
    held_after: float
    kept: bool


def one_format(names: Iterable[str], schemes: Mapping[str, QuantizedScheme]) -> tuple[tuple[str, ...], QuantizedScheme | None]:
    """Those of `names`, layers that share an input, that have a format, and which one. Raises InvalidInput where they have several."""
    chosen = tuple(name for name in names if name in schemes)
    for name in chosen:
        if schemes[name] != schemes[chosen[0]]:
            raise InvalidInput(
                f"{chosen[0]} and {name} share an input but are to be {schemes[chosen[0]].slug} and {schemes[name].slug}: "
                "give them one format",
                param="model",
            )
    return chosen, schemes[chosen[0]] if chosen else None


@dataclass(frozen=True)
class Training:
    """What a run hands to methods that train. `directory` is where their checkpoints are kept; None: nowhere. `tell` is given steps done,
    steps in all, the last loss and seconds left; `record` what training a block came to.
    """

    directory: Path | None = None
    tell: Callable[[int, int, float, float], None] = lambda *_: None
    record: Callable[[BlockLoss], None] = lambda _: None


class Block:
    """A method may change floating weights in place, and hands every layer over with `put` (or `quantize_in_order`).

    `linears`: full name -> layer with real weights, `[out_features, in_features]` (GPT-2's transposed layers are shown as `nn.Linear`
    over the same memory). `schemes`: the format of each of them that is to be quantized. `groups` and the functions that run the block
    are there for methods that need calibration.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        schemes: Mapping[str, QuantizedScheme],
        take: Take,
        *,
        index: int = 0,
        streams: Streams | None = None,
        training: Training | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.training = training or Training()
        self.layers = linear_layers(module, name)
        self.linears = {full: _as_linear(layer) for full, layer in self.layers.items()}
        self.schemes = {full: schemes[full] for full in self.linears if full in schemes}
        self._take, self._index, self._streams = take, index, streams
        self._left = set(self.schemes)
        self._next_full: Tensor | None = None
        self._is_moved = False  # the quantized stream, to the next block
        self._keeps_whole = False
        self._whole: dict[str, Tensor] = {}  # unquantized weights that the full stream still needs, in the layers' own layout
        self._executed: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {}  # how quantized layers round their inputs
        self.groups: tuple[Group, ...] = ()
        if streams is not None:
            self.groups = find_groups(module, name, self.layers, *streams.sample(index))

    def members(self, group: Group) -> tuple[tuple[str, ...], QuantizedScheme | None]:
        """The layers of a group that are to be quantized, and their format; None where there are none.

        Raises InvalidInput where they have different ones: what shares an input is worked on, and executed, together.
        """
        return one_format(group.names, self.schemes)

    def watch(self, see: See) -> None:
        """Run the full-precision stream through the unquantized block, a chunk at a time; `see` is given each group's input in it, fp32
        [tokens, in_features].
        """
        streams = self.streams
        assert streams.full is not None, "the method asks for the full stream"
        assert len(self._left) == len(self.schemes), "the full-precision stream runs before the first layer is quantized"
        output = torch.empty_like(streams.full) if self._next_full is None else self._next_full
        for chunk in streams.chunks:
            with ExitStack() as stack:
                for group in self.groups:
                    hook = _input_hook(lambda x, group=group, chunk=chunk: see(group, chunk.tokens(x)))  # type: ignore[misc]
                    stack.callback(self.layers[group.names[0]].register_forward_pre_hook(hook).remove)
                output[chunk.samples] = self.run_chunk(chunk, streams.full[chunk.samples])
        self._next_full = output
        trim_heap()  # of what lay between the layers, before the method works

    def quantize_in_order(self, wanted: frozenset[Stream], see: SeeBoth, choose: Choose) -> None:
        """Quantize one group after the other, each on the inputs that the ones before it leave.

        For every group, `see` is given its input chunk by chunk: in the quantized stream, as the layers will see it, and for the same
        tokens in the full stream if that is `wanted` too, both fp32 [tokens, in_features]. Then `choose` returns its weights.
        """
        streams = self.streams
        assert streams.quantized is not None, "the method asks for the quantized stream"
        samples = len(streams.quantized)
        follow = {"module": self.module, "index": self._index, "layers": self.layers, "groups": self.groups, "samples": samples}
        quantized = Replay(**follow, weights={}, hooks=self._executed, ahead=False)  # type: ignore[arg-type]
        full = Replay(**follow, weights=self._whole, hooks={}, ahead=True) if "full" in wanted else None  # type: ignore[arg-type]
        assert full is None or streams.full is not None, "the method asks for the full stream"
        self._keeps_whole = full is not None
        if full is not None:
            self._next_full = None  # what a method before this one made of it: the last group's run gives it again
        for step, group in enumerate(self.groups):
            for chunk in streams.chunks:
                exact = None if full is None else chunk.tokens(self._full_input(full, step, chunk))
                x, _ = quantized.group_input(step, chunk, streams.quantized[chunk.samples])
                see(group, chunk.tokens(self._as_executed(group, x)), exact)
                del x, exact
            if full is not None:
                self._keeps_whole = step < len(self.groups) - 1
                self._forget_whole(full)
            trim_heap()
            for name, weight in choose(group).items():
                self.put(name, weight)
        self._keeps_whole = False
        self._whole.clear()
        if not streams.is_last(self._index):
            for chunk in streams.chunks:
                streams.quantized[chunk.samples] = quantized.output(chunk, streams.quantized[chunk.samples])
        self._is_moved = True

    def _full_input(self, full: Replay, step: int, chunk: Chunk) -> Tensor:
        """The last run of a chunk also gives the block's output."""
        streams = self.streams
        assert streams.full is not None
        x, output = full.group_input(step, chunk, streams.full[chunk.samples])
        if output is not None:
            if self._next_full is None:
                kept = full.buffer()  # what is kept of a chunk is read before its output takes its place
                self._next_full = torch.empty_like(streams.full) if kept is None else kept
            self._next_full[chunk.samples] = output
            full.drop(chunk)
        return x

    def _forget_whole(self, full: Replay) -> None:
        """Unquantized weights of layers that the full stream runs no more."""
        chunks = self.streams.chunks
        for name in [name for name in self._whole if all(full.has_kept(name, chunk) for chunk in chunks)]:
            del self._whole[name]

    def run_chunk(self, chunk: Chunk, hidden: Tensor) -> Tensor:
        """The output of the block as it is now for the `hidden` states [samples, length, hidden_size] of a chunk."""
        return chunk.calls[self._index].run(self.module, hidden)

    @property
    def streams(self) -> Streams:
        """The calibration tokens at this block."""
        assert self._streams is not None, "only a method with `needs_calibration` asks for calibration tokens"
        return self._streams

    def expected(self) -> Tensor:
        """What the unquantized block makes of the full stream, fp32 [samples, length, hidden_size]; to be asked for before any `put`."""
        streams = self.streams
        assert streams.full is not None, "the method asks for the full stream"
        if self._next_full is None:
            assert len(self._left) == len(self.schemes), "the full-precision stream runs before the first layer is quantized"
            self._next_full = streams.run(self.module, self._index, streams.full)
        return self._next_full

    def rehearse(self, method: Method) -> dict[str, QuantizedWeight]:
        """What `method` would hand over for this block, which with its streams is afterwards as it was."""
        weights = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}
        chosen: dict[str, QuantizedWeight] = {}
        stage = Block(
            self.name,
            self.module,
            self.schemes,
            lambda name, weight, *_: chosen.__setitem__(name, weight),
            index=self._index,
            streams=self.streams.copy(),
        )
        method.apply(stage)
        for name, weight in weights.items():
            self.linears[name].weight.copy_(weight)
        self._next_full = stage._next_full
        return chosen

    def submodule(self, name: str) -> nn.Module:
        """The module of this block with that full name."""
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    def run_sample(self) -> tuple[Tensor, Tensor]:
        """Input and output of the block as it is now, fp32 [1, length, hidden_size], for the first sample."""
        call, hidden = self.streams.sample(self._index)
        return hidden, call.run(self.module, hidden)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Hand over the quantized weight of the layer `name`; its error is taken against the weight that `linears[name]` holds now.

        Where calibration tokens flow, the block computes with the quantized weight from here on.
        """
        if name not in self._left:
            raise QuantizationFailed("was handed over twice or is no layer of this block", layer=name)
        if self._streams is not None and self._streams.full is not None and not self._keeps_whole:
            self.expected()  # the last moment: the block is whole
        self._left.remove(name)
        floating, quantized = self.linears[name].weight, weight.dequantize()
        self._take(name, weight, squares(floating - quantized), squares(floating))
        if self._streams is not None and self._streams.quantized is not None:
            if self._keeps_whole:
                self._whole[name] = self.layers[name].weight.detach().clone()  # type: ignore[operator]
            floating.copy_(quantized)
            if getattr(weight.scheme, "activation_bits", None):
                self._executed[name] = lambda _, args: (executed_tokens(args[0]), *args[1:])

    def finish(self, *, last: bool) -> None:
        """Check that every layer was handed over, and move the streams on to the next block, unless there is none."""
        if self._left:
            raise QuantizationFailed(f"the method left {len(self._left)} layers of this block unquantized", layer=min(self._left))
        streams = self._streams
        if streams is None or last:
            return
        if streams.quantized is not None and not self._is_moved:
            # Its own tensor, unless this is the first block: there it is the other stream's input too, which is read no more.
            with ExitStack() as stack:
                for name, hook in self._executed.items():
                    stack.callback(self.layers[name].register_forward_pre_hook(hook).remove)
                streams.run_into(streams.quantized, self.module, self._index, streams.quantized)
        if streams.full is not None:
            assert self._next_full is not None, "made at the first `put` at the latest"
            streams.full = self._next_full

    def _as_executed(self, group: Group, x: Tensor) -> Tensor:
        return executed_tokens(x) if getattr(self.members(group)[1], "activation_bits", None) else x


def _input_hook(act: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        act(args[0])

    return hook


def executed_tokens(x: Tensor) -> Tensor:
    """`x` [..., in_features] as a layer with int8 tokens computes with it."""
    codes, scale = quantize_tokens(x.reshape(-1, x.shape[-1]))
    return (codes.float() * scale).view(x.shape)


def squares(tensor: Tensor) -> float:
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
