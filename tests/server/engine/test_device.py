"""The device's own account of its memory, against the kernel's other accounts of the same."""

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from quantizers.errors import InvalidInput
from server.engine.device import (
    DeviceMemory,
    Gpu,
    _container_limit,
    default_budget,
    gpus,
    measure,
    move,
    open_device,
    proportional_set_size,
)

CPU = torch.device("cpu")


def test_the_cpu_is_always_there() -> None:
    assert open_device("cpu") == CPU
    assert open_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "cpu:1", "cuda:-1"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(InvalidInput, match="is not on this machine: use one of auto, cpu") as caught:
        open_device(name)
    assert caught.value.param == "device"


def test_the_process_is_counted_with_what_it_touches() -> None:
    size = 64 << 20
    before = proportional_set_size()
    with mmap.mmap(-1, size) as block:  # pages that no allocator held before
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert size * 0.9 < proportional_set_size() - before < size * 1.5
    assert proportional_set_size() <= psutil.Process().memory_info().rss * 1.05


def test_numbers_of_the_machine_hang_together() -> None:
    memory = measure(CPU)
    assert 0 < memory.used < memory.total
    assert 0 < memory.free < memory.total
    assert default_budget(CPU) == pytest.approx(0.8 * memory.free, rel=0.2)  # other processes come and go meanwhile


def test_a_containers_limit_is_read(tmp_path: Path) -> None:
    assert _container_limit(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert _container_limit(tmp_path) == DeviceMemory(total=1000, used=700, free=450)


def test_a_gpu_is_described_by_what_decides_what_runs() -> None:
    gib = 1 << 30
    gpu = Gpu("NVIDIA H100", (9, 0), DeviceMemory(total=80 * gib, used=gib // 2, free=80 * gib - gib // 2), None)
    assert str(gpu) == "NVIDIA H100: compute capability 9.0, 80.0 GiB, 79.5 GiB free; runs the Triton kernels"
    old = Gpu("Tesla T4", (7, 5), DeviceMemory(total=16 * gib, used=0, free=16 * gib), "compute capability 7.5 is below 8.0")
    assert str(old).endswith("16.0 GiB free; runs the reference kernels: compute capability 7.5 is below 8.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_there_is_none_to_describe() -> None:
    assert gpus() == ()


def test_what_is_moved_is_what_was_there() -> None:
    there = torch.arange(6).view(2, 3).T  # not contiguous
    assert torch.equal(move(there, CPU), there)
    assert move(there, torch.device("meta")).shape == there.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpus_of_this_machine() -> None:
    found = gpus()
    assert len(found) == torch.cuda.device_count()
    assert 0 < default_budget(open_device("cuda")) < found[0].memory.total
    assert found[0].capability >= (8, 0) or found[0].why_not is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_by_its_driver() -> None:
    device = open_device("cuda")
    before = measure(device)
    block = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    assert measure(device).used - before.used >= block.nbytes * 0.9
