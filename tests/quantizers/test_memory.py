"""Peak memory is what was held at once, not what went through or what was there before."""

import time

import pytest
import torch

from quantizers.memory import PeakMemory, trim_heap

MIB = 1 << 20


def test_the_peak_is_what_was_held_at_once() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    trim_heap()
    with PeakMemory("cpu") as peak:
        for _ in range(8):
            held = torch.ones(32 * MIB, dtype=torch.uint8)
            assert held[-1] == 1
            time.sleep(0.02)  # some samples long
            del held
    assert 30 * MIB < peak.bytes < 80 * MIB
    assert before.numel() == 64 * MIB


def test_an_error_inside_is_not_swallowed_and_the_sampler_ends() -> None:
    with pytest.raises(ZeroDivisionError), PeakMemory("cpu") as peak:
        print(1 // 0)
    assert not peak._thread.is_alive()
