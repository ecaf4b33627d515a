"""The most memory that a piece of work held, measured while it runs; and giving freed memory back."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch

from quantizers.errors import OutOfMemory

LARGE_TENSOR = 8 << 20  # bytes
_LARGE_WEIGHT = 1 << 19
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_INTERVAL = 0.005  # seconds between samples on a CPU: a layer's scratch space lives for tens of milliseconds


class PeakMemory:
    """Context manager; `bytes` afterwards: the peak beyond what was held at entry.

    On a GPU the allocator's own peak. On a CPU the process's private resident memory is sampled (pages of mapped files, which the
    kernel may drop at will, do not count), so a peak shorter than a few milliseconds can be missed.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self._done = threading.Event()
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        else:
            self._before = _private_bytes()
            self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - self._before
            return
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, _private_bytes() - self._before)
            if self._done.wait(_INTERVAL):
                return


def _private_bytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def keep_large_tensors_apart(*, tokens_flow: bool) -> None:
    """Have large tensors in pages of their own, which go back when they are freed, where the C library can.

    glibc raises that bound by itself to 32 MB and keeps freed pages for later, which made the peak half as large again as what was
    alive. Where tokens flow through blocks, those below LARGE_TENSOR still come from the heap: giving pages back and zeroing new ones
    would cost a third of the time. Where only weights are worked on, it costs a second a model.
    """
    bound = LARGE_TENSOR if tokens_flow else _LARGE_WEIGHT
    _set_thresholds(bound, bound)  # setting the one makes the other small, and the heap would shrink at every chance


def keep_freed_memory() -> None:
    """Have what is freed kept for later, as glibc does by itself in a process that never called `keep_large_tensors_apart`."""
    _set_thresholds(32 << 20, 64 << 20)


def _set_thresholds(mmap: int, trim: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap)
        mallopt(_M_TRIM_THRESHOLD, trim)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what a walk over many layers frees in pieces between small live allocations: a few hundred megabytes on a small model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def memory_for(layer: str) -> Iterator[None]:
    """Raises OutOfMemory naming `layer` (or the block) where an allocation inside fails."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _refused(layer, error) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU allocator's words; it has no type of its own
            raise
        raise _refused(layer, error) from error


def _refused(layer: str, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"{layer}: there is not enough memory to quantize it: free some, give fewer or shorter calibration samples, or take a method that "
        f"needs none, such as rtn ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )
