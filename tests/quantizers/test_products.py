"""fp32 products during calibration: none is rounded to bf16, whatever units the CPU has, and the setting goes back to what it was."""

from typing import Any

import pytest
import torch

from quantizers.products import quick_products


def test_products_are_those_of_fp32() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(512, 256), torch.randn(96, 256)
    exact = x.double() @ w.double().T
    with quick_products():
        error = (torch.nn.functional.linear(x, w).double() - exact).norm() / exact.norm()
    assert error < 1e-6


@pytest.mark.parametrize(
    ("cpu", "permits"),
    [
        ({"architecture": "x86_64", "amx_bf16": False}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bf16_is_permitted_where_no_unit_makes_use_of_it(monkeypatch: pytest.MonkeyPatch, cpu: dict[str, Any], permits: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="stopped"), quick_products():
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == permits
        raise RuntimeError("stopped")
    assert torch.backends.mkldnn.matmul.fp32_precision == before
