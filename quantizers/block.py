"""One decoder block in fp32, as a method sees it: its layers, which of them share an input, and the calibration tokens that run through."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantizers.activations import quantize_tokens
from quantizers.blocks import layer_shape, linear_layers
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.flow import Group, Streams, find_groups
from quantizers.weights import QuantizedScheme, QuantizedWeight

See = Callable[[Group, Tensor], None]
Choose = Callable[[Group, Tensor], Mapping[str, QuantizedWeight]]
Take = Callable[[str, QuantizedWeight, float, float], None]


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
    ) -> None:
        self.name = name
        self.module = module
        self._layers = linear_layers(module, name)
        self.linears = {full: _as_linear(layer) for full, layer in self._layers.items()}
        self.schemes = {full: schemes[full] for full in self.linears if full in schemes}
        self._take, self._index, self._streams = take, index, streams
        self._left = set(self.schemes)
        self._next_full: Tensor | None = None
        self._next_quantized: Tensor | None = None
        self.groups: tuple[Group, ...] = ()
        if streams is not None:
            self.groups = find_groups(module, name, self._layers, *streams.sample(index))

    def members(self, group: Group) -> tuple[tuple[str, ...], QuantizedScheme | None]:
        """The layers of a group that are to be quantized, and their format; None where there are none.

        Raises InvalidInput where they have different ones: what shares an input is worked on, and executed, together.
        """
        names = tuple(name for name in group.names if name in self.schemes)
        schemes = [self.schemes[name] for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            if scheme != schemes[0]:
                raise InvalidInput(
                    f"{names[0]} and {name} share an input but are to be {schemes[0].slug} and {scheme.slug}: give them one format",
                    param="model",
                )
        return names, schemes[0] if schemes else None

    def watch(self, see: See) -> None:
        """Run the full-precision stream through the unquantized block; `see` is given each group's input, fp32 [tokens, in_features]."""
        streams = self._flowing()
        assert streams.full is not None, "the method asks for the full stream"
        assert len(self._left) == len(self.schemes), "the full-precision stream runs before the first layer is quantized"
        with ExitStack() as stack:
            for group in self.groups:
                stack.callback(self._on_input(group, lambda group, x: see(group, streams.tokens(x))))
            self._next_full = streams.run(self.module, self._index, streams.full)

    def quantize_in_order(self, choose: Choose) -> None:
        """Run the quantized stream through the block once. When it reaches a group, `choose` is given its input, fp32
        [tokens, in_features] as the layers will see it, and returns their weights, with which the run goes on.
        """
        streams = self._flowing()
        assert streams.quantized is not None, "the method asks for the quantized stream"

        def reached(group: Group, x: Tensor) -> Tensor | None:
            seen = self._as_executed(group, x)
            for name, weight in choose(group, streams.tokens(seen)).items():
                self.put(name, weight)
            return seen if seen is not x else None

        with ExitStack() as stack:
            for group in self.groups:
                stack.callback(self._on_input(group, reached))
            self._next_quantized = streams.run(self.module, self._index, streams.quantized)

    def submodule(self, name: str) -> nn.Module:
        """The module of this block with that full name."""
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    def run_sample(self) -> tuple[Tensor, Tensor]:
        """Input and output of the block as it is now, fp32 [1, length, hidden_size], for the first sample."""
        call, hidden = self._flowing().sample(self._index)
        return hidden, call.run(self.module, hidden)

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Hand over the quantized weight of the layer `name`; its error is taken against the weight that `linears[name]` holds now.

        Where calibration tokens flow, the block computes with the quantized weight from here on.
        """
        if name not in self._left:
            raise QuantizationFailed("was handed over twice or is no layer of this block", layer=name)
        if self._streams is not None and self._streams.full is not None and self._next_full is None:
            self._next_full = self._streams.run(self.module, self._index, self._streams.full)  # the last moment: the block is whole
        self._left.remove(name)
        floating, quantized = self.linears[name].weight, weight.dequantize()
        self._take(name, weight, squares(floating - quantized), squares(floating))
        if self._streams is not None and self._streams.quantized is not None:
            floating.copy_(quantized)
            if getattr(weight.scheme, "activation_bits", None):
                self._layers[name].register_forward_pre_hook(lambda _, args: (executed_tokens(args[0]), *args[1:]))

    def finish(self, *, last: bool) -> None:
        """Check that every layer was handed over, and move the streams on to the next block, unless there is none."""
        if self._left:
            raise QuantizationFailed(f"the method left {len(self._left)} layers of this block unquantized", layer=min(self._left))
        streams = self._streams
        if streams is None or last:
            return
        if streams.quantized is not None:
            done = self._next_quantized
            streams.quantized = streams.run(self.module, self._index, streams.quantized) if done is None else done
        if streams.full is not None:
            assert self._next_full is not None, "made at the first `put` at the latest"
            streams.full = self._next_full

    def _flowing(self) -> Streams:
        assert self._streams is not None, "only a method with `needs_calibration` asks for calibration tokens"
        return self._streams

    def _on_input(self, group: Group, act: Callable[[Group, Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `act` when the first layer of `group` is called; what it returns is the layer's input instead. Returns the undoing."""
        return self._layers[group.names[0]].register_forward_pre_hook(_input_hook(group, act)).remove

    def _as_executed(self, group: Group, x: Tensor) -> Tensor:
        return executed_tokens(x) if getattr(self.members(group)[1], "activation_bits", None) else x


def _input_hook(group: Group, act: Callable[[Group, Tensor], Tensor | None]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        replaced = act(group, args[0])
        return None if replaced is None else (replaced, *args[1:])

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
