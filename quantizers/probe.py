"""What passes through a model while it runs: the outputs of its decoder blocks, and how wide the inputs of its linear layers are."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantizers.report import Activations, InputRange


class Probe:
    """Context manager over a model. `outputs`: of each decoder block in the last pass, fp32 [tokens, hidden_size], on its device.

    blocks: full name of each decoder block, in order -> full names of its linear layers, quantized or not.
    """

    def __init__(self, model: PreTrainedModel, blocks: Mapping[str, Sequence[str]]) -> None:
        self._model, self._blocks = model, blocks
        self._stack = ExitStack()
        self._largest: dict[str, Tensor] = {}
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Self:
        for index, (block, layers) in enumerate(self._blocks.items()):
            self._stack.callback(self._model.get_submodule(block).register_forward_hook(self._block_hook(index)).remove)
            for name in layers:
                self._stack.callback(self._model.get_submodule(name).register_forward_pre_hook(self._layer_hook(name)).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        self.outputs = []

    def _block_hook(self, index: int) -> Any:
        def hook(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            if index == 0:
                self.outputs = []
            self.outputs.append(hidden.reshape(-1, hidden.shape[-1]).float())

        return hook

    def _layer_hook(self, name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            largest = x.reshape(-1, x.shape[-1]).float().abs().amax(0)
            self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest

        return hook

    def activations(self, widest: str | None = None) -> Activations:
        """Over all passes so far. Layers of one block that saw the same input are one. `widest` is found where it is not given."""
        ranges: dict[str, InputRange] = {}
        for layers in self._blocks.values():
            seen: list[Tensor] = []
            for name in layers:
                largest = self._largest[name]
                if not any(torch.equal(largest, other) for other in seen):
                    seen.append(largest)
                    ranges[name] = InputRange(layer=name, largest=float(largest.max()), median=float(largest.median()))
        widest = widest or max(ranges, key=lambda name: ranges[name].outlier)
        return Activations(inputs=tuple(ranges.values()), widest=widest, channels=tuple(self._largest[widest].tolist()))
