"""NaN and infinity are found wherever they are, and large numbers are not taken for them."""

import pytest
import torch

from quantizers.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_no_number_is_found(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 7, 11):
            tensor = torch.ones(3, 4, dtype=dtype)
            tensor.view(-1)[place] = bad
            assert not all_finite(tensor)
    both = torch.tensor([float("inf"), float("-inf")], dtype=dtype)
    assert not all_finite(both) and all_finite(torch.ones(0, dtype=dtype))


def test_numbers_whose_sum_overflows_are_numbers() -> None:
    assert all_finite(torch.full((9,), 3e38)) and all_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert all_finite(torch.tensor([1e300], dtype=torch.float64)) and all_finite(torch.arange(5))
