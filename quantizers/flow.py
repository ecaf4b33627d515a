"""What flows through the decoder blocks of a model: a block's inputs as the model itself makes them, and which layers share an input.

Nothing here knows an architecture. The model runs up to its blocks, each of which only notes with what it was called (masks, position
embeddings, whatever else the architecture hands over) and passes the hidden states on; a block's inner flow is found by running it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.methods.base import Stream

_HIDDEN = "hidden_states"


class _Done(Exception):
    """Ends the model's forward pass once the last block has been called."""


@dataclass(frozen=True)
class Call:
    """With what a model calls one block, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for `hidden` [samples, length, hidden_size], of that shape."""
        output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass(frozen=True)
class BlockInputs:
    """`hidden` fp32 [samples, length, hidden_size] is the first block's input; `calls` has one entry a block. in_tuple: blocks return their
    hidden states as the first of a tuple.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    in_tuple: bool = False


def block_inputs(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, mask: Tensor) -> BlockInputs:
    """Run `model` up to its blocks on `tokens` int64 [samples, length] with the attention mask `mask` of that shape, 1 for a real token.

    The blocks' own weights are not touched; everything before them must be there. Raises InvalidInput where the model does not call its
    blocks one after the other.
    """
    for in_tuple in (False, True):  # a block returns its hidden states alone or first in a tuple: what comes back tells which
        recorder = _Recorder(len(blocks), in_tuple)
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                block.forward = recorder.stand_in(index)
                stack.callback(delattr, block, "forward")
            try:
                model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
            except _Done:
                return BlockInputs(recorder.hidden[0], tuple(recorder.calls), in_tuple)
            except (_Unexpected, TypeError, ValueError, IndexError, AttributeError) as error:
                failure = error
    raise InvalidInput(
        f"{type(model).__name__} does not call its decoder blocks in order, so no method with calibration can follow it: use rtn",
        param="model",
    ) from failure


class _Unexpected(Exception):
    """A block was handed something else than the block before it returned."""


class _Recorder:
    def __init__(self, count: int, in_tuple: bool) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[Call] = []
        self._count, self._in_tuple = count, in_tuple

    def stand_in(self, index: int) -> Any:
        """In the place of block `index`'s forward."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop(_HIDDEN)
            if index != len(self.calls) or (self.hidden and hidden is not self.hidden[-1]):
                raise _Unexpected
            self.hidden.append(hidden)
            self.calls.append(Call(args[1:], kwargs))
            if len(self.calls) == self._count:
                raise _Done
            return (hidden,) if self._in_tuple else hidden

        return forward


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that take the same input, by full name in the order of their calls.

    norm: full name of the normalization whose output that input is; None where it is something else's. routers: full names of modules
    with a matrix [any, in] that take it too and are not quantized.
    """

    names: tuple[str, ...]
    norm: str | None
    routers: tuple[str, ...] = ()


def find_groups(block: nn.Module, prefix: str, layers: Mapping[str, nn.Module], call: Call, hidden: Tensor) -> tuple[Group, ...]:
    """Run `block` once on `hidden` and see which of its `layers` (full name -> module) were given the same tensor, in order.

    Raises QuantizationFailed naming a layer that did not run.
    """
    inputs: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    readers: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(_keep_input(inputs, name)).remove)
        for name, module in block.named_modules(prefix=prefix):
            if _is_norm(module):
                stack.callback(module.register_forward_hook(_keep_output(norms, name)).remove)
            elif name not in layers and _has_matrix(module):
                stack.callback(module.register_forward_pre_hook(_keep_input(readers, name)).remove)
        call.run(block, hidden)
    for name in layers:
        if name not in inputs:
            raise QuantizationFailed("did not run on the calibration tokens, so nothing is known of its inputs: use rtn", layer=name)
    members: dict[tuple[int, int, int], list[str]] = {}
    for name, tensor in inputs.items():
        members.setdefault(_place(tensor), []).append(name)
    by_place = {_place(tensor): name for name, tensor in norms.items()}
    reading = {place: tuple(name for name, tensor in readers.items() if _place(tensor) == place) for place in members}
    return tuple(Group(tuple(names), by_place.get(place), reading[place]) for place, names in members.items())


def _keep_input(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, args[0])

    return hook


def _keep_output(outputs: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(name, output)

    return hook


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, or an architecture's own kind: one vector of weights and a name that says so."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and (isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower())


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """The same for a tensor and its reshaped views. All tensors compared are alive, so no place is used twice."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


CHUNK_TOKENS = 1024  # that run through a block at once: products of matrices are at full speed, and what lies between layers is small


@dataclass(frozen=True)
class Chunk:
    """Some samples that run through a block together: which ones, and how the model calls each of its blocks with them."""

    samples: slice
    calls: tuple[Call, ...]
    kept: Tensor | None  # bool [tokens of the chunk], False for padding; None where there is none

    def tokens(self, x: Tensor) -> Tensor:
        """A layer's input [..., in_features] -> [tokens, in_features] without padding, where rows are the samples' tokens in order."""
        return _without_padding(x, self.kept)


def _without_padding(x: Tensor, kept: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows[kept] if kept is not None and len(kept) == len(rows) else rows


class Streams:
    """The calibration tokens on their way through the blocks, as the checkpoint computes them and as the quantized model so far does.

    full, quantized: fp32 [samples, length, hidden_size], the inputs of the block that is at work; one tensor until they differ. A stream
    that no method of the recipe asks for is None and costs nothing. Blocks run on one of `chunks` after the other, so that what is alive
    inside of a block does not grow with the number of samples.
    """

    def __init__(
        self,
        hidden: Tensor,
        chunks: Sequence[Chunk],
        sample_calls: tuple[Call, ...],
        mask: Tensor,
        wanted: frozenset[Stream],
        *,
        in_tuple: bool = False,
    ) -> None:
        """`sample_calls` are those of the first sample alone; `mask` int64 [samples, length] is 1 where a token counts."""
        self.full = hidden if "full" in wanted else None
        self.quantized = hidden if "quantized" in wanted else None
        self.chunks = tuple(chunks)
        self.in_tuple = in_tuple
        self._sample_calls = sample_calls
        self.token_count = int(mask.sum())
        self._kept = _kept(mask)

    def copy(self) -> "Streams":
        """Streams that move on without these."""
        copied = copy(self)
        copied.quantized = None if self.quantized is None else self.quantized.clone()
        return copied

    def run(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The output of block `index` for all samples."""
        output = torch.empty_like(hidden)
        self.run_into(output, block, index, hidden)
        return output

    def run_into(self, output: Tensor, block: nn.Module, index: int, hidden: Tensor) -> None:
        """The same into `output`, which may be `hidden` itself."""
        for chunk in self.chunks:
            output[chunk.samples] = chunk.calls[index].run(block, hidden[chunk.samples])

    def is_last(self, index: int) -> bool:
        """Whether no block follows the block `index`."""
        return index == len(self._sample_calls) - 1

    def sample(self, index: int) -> tuple[Call, Tensor]:
        """The call and the input of block `index` for the first sample alone: [1, length, hidden_size]."""
        stream = self.full if self.full is not None else self.quantized
        assert stream is not None, "streams are made for a method that wants one"
        return self._sample_calls[index], stream[:1]

    def tokens(self, x: Tensor) -> Tensor:
        """`x` [samples, length, any] -> [tokens, any] without padding."""
        return _without_padding(x, self._kept)


def _kept(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.reshape(-1).bool()


def open_streams(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    mask: Tensor,
    wanted: frozenset[Stream],
    *,
    chunk_tokens: int | None = None,
) -> Streams:
    """The streams before the first block, in chunks of about `chunk_tokens`, or CHUNK_TOKENS. Raises as `block_inputs` does."""
    samples, length = tokens.shape
    step = max(1, (chunk_tokens or CHUNK_TOKENS) // length)
    hidden: Tensor | None = None
    chunks = []
    for start in range(0, samples, step):
        rows = slice(start, min(start + step, samples))
        inputs = block_inputs(model, blocks, tokens[rows], mask[rows])
        if hidden is None:
            hidden = inputs.hidden.new_empty(samples, *inputs.hidden.shape[1:])
        hidden[rows] = inputs.hidden
        chunks.append(Chunk(rows, inputs.calls, _kept(mask[rows])))
    assert hidden is not None, "a calibration has samples"
    sample = block_inputs(model, blocks, tokens[:1], mask[:1])
    return Streams(hidden, chunks, sample.calls, mask, wanted, in_tuple=sample.in_tuple)
