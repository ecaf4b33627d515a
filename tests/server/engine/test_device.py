"""The device's own account of its memory, against the kernel's other accounts of the same."""

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from quantizers.errors import InvalidInput
from server.engine.device import DeviceMemory, _container_limit, default_budget, measure, open_device, proportional_set_size

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_by_its_driver() -> None:
    device = open_device("cuda")
    before = measure(device)
    block = torch.ones(256 << 20, dtype=torch.uint8, device=device)
    assert measure(device).used - before.used >= block.nbytes * 0.9
