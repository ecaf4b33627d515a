"""The device that residents live on, and how much memory it has by its own account.

On a GPU the driver is asked (free and total of the whole device); on a CPU the kernel is: what this process really occupies is its
proportional set size, because pages of a mapped checkpoint are shared with whoever else maps it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from quantizers.errors import InvalidInput
from quantizers.kernels import cuda

logger = logging.getLogger(__name__)

_BUDGET_SHARE = 0.8  # the rest is for activations, the allocator's slack and whatever else starts on the machine
_CGROUP = Path("/sys/fs/cgroup")
_SMAPS = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. `used` is the whole device's on a GPU and this process's on a CPU; `free` is what new allocations may take."""

    total: int
    used: int
    free: int


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as torch sees it. `why_not`: why our kernels do not run on it, None where they do."""

    name: str
    capability: tuple[int, int]
    memory: DeviceMemory
    why_not: str | None

    def __str__(self) -> str:
        gib = 2.0**30
        memory = f"{self.memory.total / gib:.1f} GiB, {self.memory.free / gib:.1f} GiB free"
        kernels = "runs the Triton kernels" if self.why_not is None else f"runs the reference kernels: {self.why_not}"
        return f"{self.name}: compute capability {self.capability[0]}.{self.capability[1]}, {memory}; {kernels}"


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this machine, in torch's order."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return tuple(
        Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), measure(device), cuda.why_not(device))
        for device in devices
    )


def open_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises InvalidInput where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in allowed:
        raise InvalidInput(f"device {name!r} is not on this machine: use one of {', '.join(allowed)}", param="device")
    return torch.device(name if ":" in name else "cuda:0")


def measure(device: torch.device) -> DeviceMemory:
    """What the driver says now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total=total, used=total - free, free=free)
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    limit = _container_limit()
    if limit is not None:
        total, free = min(total, limit.total), min(free, limit.free)
    return DeviceMemory(total=total, used=proportional_set_size(), free=free)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for what the device does meanwhile."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the allocator keeps the pinned copy until it was read


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on the host in the calling thread alone.

    For what is small: threads that had helped would go on spinning for milliseconds, on the cores that the next native step needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def default_budget(device: torch.device) -> int:
    """Bytes that residents may hold where the settings name none: 80 % of what is free now."""
    return int(_BUDGET_SHARE * measure(device).free)


def proportional_set_size() -> int:
    """Bytes of this process, with each shared page divided by its users; the resident set where the kernel does not tell."""
    try:
        for line in _SMAPS.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10  # the file counts in KiB
    except OSError as error:
        logger.debug("no %s (%s): counting the resident set instead", _SMAPS, error)
    return int(psutil.Process().memory_info().rss)


def _container_limit(cgroup: Path = _CGROUP) -> DeviceMemory | None:
    """The memory limit of the container (cgroup v2), None outside of one or without a limit."""
    try:
        total, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
        reclaimable = sum(
            int(line.split()[1]) for line in (cgroup / "memory.stat").read_text().splitlines() if line.split()[0] == "inactive_file"
        )
    except OSError:
        return None  # no cgroup v2 here: the machine's own numbers hold
    if total == "max":
        return None
    return DeviceMemory(total=int(total), used=used, free=max(0, int(total) - used + reclaimable))
