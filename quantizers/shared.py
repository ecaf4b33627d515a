"""Tensors that several resident variants use, held once: embeddings, norms and whatever else a recipe leaves alone."""

from collections.abc import Callable
from threading import Lock

from torch import Tensor, device, dtype

SharedKey = tuple[str, str, dtype, device]  # checkpoint, name of the tensor in it, the dtype that it was cast to, where it lies


class SharedTensors:
    """A cache that counts its users: a tensor is made by the first and dropped with the last. Safe among threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: dict[SharedKey, tuple[Tensor, int]] = {}

    def acquire(self, key: SharedKey, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of `key`, made by `make` where nobody holds it yet. Each call needs one `release`."""
        with self._lock:
            tensor, users = self._entries[key] if key in self._entries else (make(), 0)
            self._entries[key] = (tensor, users + 1)
            return tensor

    def release(self, key: SharedKey) -> None:
        with self._lock:
            tensor, users = self._entries.pop(key)
            if users > 1:
                self._entries[key] = (tensor, users - 1)

    @property
    def bytes(self) -> int:
        """What the cache holds now, each tensor once."""
        with self._lock:
            return sum(tensor.nbytes for tensor, _ in self._entries.values())

    @property
    def count(self) -> int:
        """Tensors held now."""
        return len(self._entries)
