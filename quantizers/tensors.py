"""Where tensors come from and go to, so that nothing in this package knows of disks: `model_store` implements both ends."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

TensorSink = Callable[[str, "torch.Tensor"], None]


class TensorSource(Protocol):
    """Named tensors, read one at a time. What `get` returns lies on the CPU, may be a view of a mapped file, and must not be changed."""

    def keys(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> "torch.dtype": ...

    def get(self, name: str) -> "torch.Tensor": ...
