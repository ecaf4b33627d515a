"""A stream of calibration tokens through a block that is being quantized group by group.

A layer's statistics need the layers before it quantized, and a chunk of tokens is thrown away once it has been looked at, so each group
of layers costs a run of every chunk up to it. What is settled is not computed again: the output of a part of the block (such as its
attention) whose layers all have their final weights is kept, a tensor of the size of the stream.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantizers.experts import Expert
from quantizers.flow import Chunk, Group


class _Stop(Exception):
    """Ends a run of the block where nothing further is wanted of it."""


class Replay:
    """The runs of one stream.

    weights: full name -> weight, in the layer's own layout, of layers that this stream computes with another weight than the module's.
    hooks: full name -> pre-hook of the layers whose input is to be changed. Both are looked at anew in each run. ahead: the weights of
    a group are final before its statistics are taken, as they are in the stream of full precision. samples: of the whole stream.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        layers: Mapping[str, nn.Module],
        groups: Sequence[Group],
        *,
        weights: Mapping[str, Tensor],
        hooks: Mapping[str, Callable[..., Any]],
        ahead: bool,
        samples: int,
    ) -> None:
        self._module, self._index, self._layers, self._groups = module, index, layers, groups
        self._weights, self._hooks, self._ahead, self._samples = weights, hooks, ahead, samples
        self._parts = {part: step for part, step in _parts(module, layers, groups).items() if step < len(groups) - 1}
        self._buffers: dict[nn.Module, Tensor] = {}  # output of a part, of the shape of the stream
        self._kept: dict[
            tuple[nn.Module, int], Callable[[Tensor], Any]
        ] = {}  # filled for that first sample; makes of it what the part returns

    def group_input(self, step: int, chunk: Chunk, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of group `step` for the chunk's `hidden` [samples, length, hidden_size]; beside it the block's output, where the run
        went on to the end.
        """
        found: list[Tensor] = []
        goes_on = self._ahead and (step == len(self._groups) - 1 or step in self._parts.values())

        def reached(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            if not goes_on:
                raise _Stop

        def enough(_: nn.Module, __: tuple[Any, ...]) -> None:
            if found:
                raise _Stop

        hooks: dict[int, Callable[..., None]] = {step: reached}
        if self._ahead and step < len(self._groups) - 1:
            hooks[step + 1] = enough
        output = self._run(chunk, hidden, settled=step if self._ahead else step - 1, hooks=hooks, to_the_end=goes_on)
        return found[0], output

    def output(self, chunk: Chunk, hidden: Tensor) -> Tensor:
        """The block's output for the chunk's `hidden`; what was kept for it is dropped."""
        output = self._run(chunk, hidden, settled=len(self._groups), hooks={}, to_the_end=True)
        assert output is not None, "nothing stops it"
        self.drop(chunk)
        return output

    def buffer(self) -> Tensor | None:
        """A tensor of the size of the stream for the outputs of chunks that are not run again, None where nothing was kept in one."""
        return next(iter(self._buffers.values()), None)

    def drop(self, chunk: Chunk) -> None:
        """Forget what was kept for a chunk that is not run again."""
        for part in self._parts:
            self._kept.pop((part, chunk.samples.start), None)

    def has_kept(self, name: str, chunk: Chunk) -> bool:
        """Whether the layer `name` runs no more for this chunk."""
        return any((part, chunk.samples.start) in self._kept for part in self._parts if self._layers[name] in set(part.modules()))

    def _run(
        self, chunk: Chunk, hidden: Tensor, *, settled: int, hooks: Mapping[int, Callable[..., None]], to_the_end: bool
    ) -> Tensor | None:
        with ExitStack() as stack:
            if not to_the_end:
                for expert in self._idle([self._layers[self._groups[step].names[0]] for step in hooks]):
                    _answer_with(stack, expert, 0.0)
            for name, weight in self._weights.items():
                _exchange(stack, self._layers[name], weight)
            for name, hook in self._hooks.items():
                stack.callback(self._layers[name].register_forward_pre_hook(hook).remove)
            for step, reached in hooks.items():
                stack.callback(self._layers[self._groups[step].names[0]].register_forward_pre_hook(reached).remove)
            for part, step in self._parts.items():
                key = (part, chunk.samples.start)
                if key in self._kept:
                    _answer_with(stack, part, self._kept[key](self._buffers[part][chunk.samples]))
                elif step <= settled:
                    stack.callback(part.register_forward_hook(self._keep(part, chunk, hidden)).remove)
            try:
                return chunk.calls[self._index].run(self._module, hidden)
            except _Stop:
                return None

    def _idle(self, wanted: Sequence[nn.Module]) -> list[nn.Module]:
        """Experts that hold none of the `wanted` layers: they compute beside each other, and only their sum would need them."""
        return [each for each in self._module.modules() if isinstance(each, Expert) and set(wanted).isdisjoint(each.modules())]

    def _keep(self, part: nn.Module, chunk: Chunk, hidden: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            several = output if isinstance(output, tuple) else (output,)
            tensors = [each for each in several if each is not None]
            if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or tensors[0].shape != hidden.shape:
                return
            if part not in self._buffers:
                self._buffers[part] = hidden.new_empty(self._samples, *hidden.shape[1:])
            self._buffers[part][chunk.samples] = tensors[0]
            place = next(index for index, each in enumerate(several) if each is not None)
            self._kept[part, chunk.samples.start] = partial(_in_place, len(several), place) if isinstance(output, tuple) else _alone

        return hook


def _in_place(count: int, place: int, tensor: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(tensor if index == place else None for index in range(count))


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _parts(module: nn.Module, layers: Mapping[str, nn.Module], groups: Sequence[Group]) -> dict[nn.Module, int]:
    """Children of the block that hold layers, and the last group that one of them belongs to."""
    step_of = {layers[name]: step for step, group in enumerate(groups) for name in group.names}
    found: dict[nn.Module, int] = {}
    for child in module.children():
        steps = [step_of[each] for each in child.modules() if each in step_of]
        if steps and child not in step_of:
            found[child] = max(steps)
    return found


def _exchange(stack: ExitStack, layer: nn.Module, weight: Tensor) -> None:
    parameter = layer._parameters["weight"]
    assert parameter is not None
    stack.callback(setattr, parameter, "data", parameter.data)
    parameter.data = weight


def _answer_with(stack: ExitStack, part: nn.Module, output: Any) -> None:
    part.forward = lambda *_, **__: output
    stack.callback(delattr, part, "forward")
