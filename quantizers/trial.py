"""What can be known before the first block is quantized: that every layer's format fits, and that the methods can do the largest layer.

The largest layer needs the most scratch space, so whoever succeeds with it has the memory for all others, and a format that it cannot
take fails in the first minute rather than in the last hour.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantizers.block import Block
from quantizers.blocks import layer_shape
from quantizers.flow import CHUNK_TOKENS, Call, Chunk, Streams
from quantizers.grid import check_groups_fit
from quantizers.memory import memory_for
from quantizers.methods.base import Method, Stream
from quantizers.scheme import IntegerScheme, MinifloatScheme, MixedScheme
from quantizers.weights import QuantizedScheme


def check_formats(layers: Mapping[str, QuantizedScheme | MixedScheme], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises QuantizationFailed naming the first of `layers` whose inputs its groups do not divide; `shapes` are (out, in)."""
    for name, scheme in layers.items():
        for each in scheme.choices if isinstance(scheme, MixedScheme) else (scheme,):
            if isinstance(each, IntegerScheme | MinifloatScheme):
                check_groups_fit(each, shapes[name][1], name)


def largest(shapes: Mapping[str, tuple[int, int]]) -> str:
    """The layer with the most weights, of several the one with the most inputs: a Hessian is as wide as they are."""
    return max(shapes, key=lambda name: (shapes[name][0] * shapes[name][1], shapes[name][1]))


def try_layer(name: str, layer: nn.Module, scheme: QuantizedScheme, methods: Sequence[Method], tokens: int) -> None:
    """Let `methods` quantize one `layer`, whose weights are there and are changed, on random inputs, and throw away what they make.

    `tokens` of calibration are to come; as many as run through a block at once are made up here. Raises what the methods
    raise, and OutOfMemory.
    """
    parent, _, attribute = name.rpartition(".")
    module = _OneLayer(attribute, layer)
    wanted = frozenset[Stream](stream for method in methods for stream in method.streams())
    streams = _random_streams(layer, min(tokens, CHUNK_TOKENS), wanted) if wanted else None
    block = Block(parent, module, {name: scheme}, lambda *_: None, streams=streams)
    with memory_for(name):
        for method in methods:
            method.for_trial().apply(block)
    block.finish(last=True)


class _OneLayer(nn.Module):
    """A block of a normalization and one layer, whose output has the shape of its input and depends on the layer, so that it can train."""

    def __init__(self, attribute: str, layer: nn.Module) -> None:
        super().__init__()
        self.normalization = nn.LayerNorm(layer_shape(layer)[1], device=_weight(layer).device).requires_grad_(False)
        self.add_module(attribute, layer)
        self._layer = [layer]  # in a list, so that it has one name

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self._layer[0](self.normalization(hidden))
        return hidden + made.mean(-1, keepdim=True)


def _random_streams(layer: nn.Module, tokens: int, wanted: frozenset[Stream]) -> Streams:
    device = _weight(layer).device
    hidden = torch.randn(1, tokens, layer_shape(layer)[1], device=device)
    calls = (Call((), {}),)
    return Streams(hidden, [Chunk(slice(0, 1), calls, None)], calls, torch.ones(1, tokens, dtype=torch.int64, device=device), wanted)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight
