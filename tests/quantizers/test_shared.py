"""Shared tensors are made once, counted, and dropped with their last user, whichever thread asks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantizers.shared import SharedKey, SharedTensors

KEY: SharedKey = ("checkpoint", "embedding", torch.bfloat16, torch.device("cpu"))


def test_a_tensor_lives_from_its_first_user_to_its_last() -> None:
    shared, made = SharedTensors(), []
    first, second = (shared.acquire(KEY, lambda: made.append(1) or torch.ones(8)) for _ in range(2))
    assert first is second and made == [1] and shared.bytes == 32
    shared.release(KEY)
    assert shared.bytes == 32
    shared.release(KEY)
    assert shared.bytes == 0 and shared.count == 0
    with pytest.raises(KeyError):
        shared.release(KEY)


def test_what_cannot_be_made_is_not_held() -> None:
    shared = SharedTensors()
    with pytest.raises(ZeroDivisionError):
        shared.acquire(KEY, lambda: torch.ones(1 // 0))
    assert shared.count == 0


def test_threads_share_one_tensor() -> None:
    shared = SharedTensors()
    with ThreadPoolExecutor(8) as pool:
        tensors = list(pool.map(lambda _: shared.acquire(KEY, lambda: torch.ones(1000)), range(64)))
    assert len({id(tensor) for tensor in tensors}) == 1
    for _ in range(64):
        shared.release(KEY)
    assert shared.count == 0
