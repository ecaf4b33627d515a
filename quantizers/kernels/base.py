"""What every kernel is, and which one runs a layer. A kernel is one file that registers itself; the reference kernel runs everything.

A kernel is chosen once, by format, dtype, device and shape, never by the number of tokens: a token's result must not depend on how
many others are computed beside it more than the library underneath makes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantizers.weights import QuantizedScheme, QuantizedWeight, Spec

KERNELS: dict[str, type["Kernel"]] = {}


@dataclass(frozen=True)
class LayerKind:
    """All that a kernel is chosen by: the weight's format and shape, the dtype of the inputs and the device."""

    scheme: QuantizedScheme
    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


class Kernel(ABC):
    """`y = x @ w.T + bias` for one layer. The layer holds the buffers; the kernel holds only what is known from the shapes.

    `rank` orders the kernels that support a layer: the highest runs.
    """

    name: ClassVar[str]
    rank: ClassVar[int]

    def __init__(self, layer: LayerKind) -> None:
        self.layer = layer

    def __init_subclass__(cls) -> None:
        KERNELS[cls.name] = cls

    @classmethod
    @abstractmethod
    def supports(cls, layer: LayerKind) -> bool:
        """Whether this kernel runs such a layer on this machine."""

    @abstractmethod
    def specs(self) -> dict[str, Spec]:
        """Name -> (shape, dtype) of the buffers that `prepare` makes: the bytes that the layer will hold."""

    @abstractmethod
    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The buffers, on the weight's device. Called once; what it does not return is freed."""

    @abstractmethod
    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """`x` [..., in_features] -> [..., out_features], in `x.dtype`."""

    def rows(self, indices: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """fp32 [n, in_features]: rows `indices` int64 [n] of the weight. Every kernel of the format of embeddings has it."""
        raise NotImplementedError(f"{self.name} multiplies by {self.layer.scheme.slug} and looks no rows up in it")


def select(layer: LayerKind) -> Kernel:
    """The best kernel for a layer; the reference kernel supports every one. Lesser ones are not asked: one imports a library to answer."""
    ranked = sorted(KERNELS.values(), key=lambda kernel: kernel.rank, reverse=True)
    return next(kernel for kernel in ranked if kernel.supports(layer))(layer)
