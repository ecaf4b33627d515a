"""fp32 products during calibration: near enough to exact ones, and the setting goes back to what it was."""

import pytest
import torch

from quantizers.products import quick_products


def test_products_are_within_bf16_rounding_of_exact_ones() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(512, 256), torch.randn(96, 256)
    exact = x.double() @ w.double().T
    with quick_products():
        error = (torch.nn.functional.linear(x, w).double() - exact).norm() / exact.norm()
    assert error < 2**-8, "both factors rounded to 8 bits at most"


def test_the_setting_is_put_back_after_a_failure() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="stopped"), quick_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise RuntimeError("stopped")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
