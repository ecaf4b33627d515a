"""Int8 products in Triton against the reference, which is exact: w8a8 to the bit, LLM.int8() within the sums of its outliers."""

import pytest
import torch
from random_weights import random_weight

from quantizers.activations import quantize_tokens
from quantizers.kernels import KERNELS, LayerKind
from quantizers.kernels.reference import exact_int8_product
from quantizers.scheme import BnbScheme, IntegerScheme
from quantizers.weights import QuantizedScheme

CPU = torch.device("cpu")
W8A8 = IntegerScheme(weight_bits=8, activation_bits=8)
NAMES = {"integer": "triton-int8-tokens", "bnb": "triton-llm-int8"}


def both(
    scheme: QuantizedScheme, rows: int, x: torch.Tensor, bias: torch.Tensor | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """By Triton and by the reference."""
    kind = LayerKind(scheme, rows, x.shape[-1], x.dtype, CPU)
    weight = random_weight(scheme, rows, x.shape[-1], seed)
    kernel = KERNELS[NAMES[scheme.kind]](kind)
    buffers = kernel.prepare(weight)
    assert {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()} == kernel.specs()
    return kernel.run(x, buffers, bias), KERNELS["reference"](kind).run(x, weight.tensors, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(10, 128, 1), (70, 300, 17), (1, 1, 2), (3, 37, 65), (5, 300, 3)])
def test_int8_tokens_are_the_reference_to_the_bit(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype)
    for given in (None, bias):
        y, expected = both(W8A8, rows, x, given)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


def test_tokens_are_rounded_as_the_definition_rounds() -> None:
    from quantizers.kernels.cuda import int8

    x = torch.randn(4, 1030, generator=torch.Generator().manual_seed(1))
    x[0], x[1, 0], x[2] = 0, 3e38, x[2] * 1e-38  # no size, almost too large, subnormal
    codes, scale = int8.quantize(x, None, llm=False)
    expected, expected_scale = quantize_tokens(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale[:, 0])


def test_bf16_tokens() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    y, expected = both(W8A8, 9, x)
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=0)  # the interpreter cuts the result off where the reference rounds


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token_and_is_not_lost(value: float) -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3)).half()
    clean, _ = both(W8A8, 8, x)
    x[1, 77] = value
    spoiled, _ = both(W8A8, 8, x)
    assert not spoiled[1].isfinite().any()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_sums_are_exact_at_the_ends_of_the_range() -> None:
    from quantizers.kernels.cuda import int8

    columns = 2048
    x = torch.full((1, columns), -1.0)
    x[:, 1] = 127.0 / 128  # so that -1 is the largest, and lies at the end of the range
    weight = torch.full((2, columns), -128, dtype=torch.int8)
    codes, scale = int8.quantize(x, None, llm=False)
    y = int8.product(x, weight, torch.ones(2), None, None)
    assert torch.equal(y, (exact_int8_product(codes, weight) * scale[:, None]).float())


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(10, 128, 1), (70, 700, 17), (3, 37, 2)])
def test_llm_int8_is_the_reference(rows: int, columns: int, tokens: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=generator)
    x[0, columns // 2] = 20
    bias = torch.randn(rows, generator=generator)
    y, expected = both(BnbScheme(format="int8", outlier_threshold=threshold), rows, x, bias)
    assert ((y - expected).norm() / expected.norm()).item() < 1e-6


def test_llm_int8_with_fp16_outliers_and_a_token_of_zeros() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4)).half()
    x[1], x[2, 5] = 0, 1000
    y, expected = both(BnbScheme(format="int8"), 12, x)
    assert ((y.double() - expected.double()).norm() / expected.double().norm()).item() < 1e-3
    assert (y[1] == 0).all()


def test_split_products_are_the_whole_ones() -> None:
    from quantizers.kernels.cuda import int8, weight_only

    generator = torch.Generator().manual_seed(5)
    x, bias = torch.randn(2, 1300, generator=generator), torch.randn(8, generator=generator)
    weight = torch.randint(-128, 128, (8, 1300), generator=generator).to(torch.int8)
    plan = weight_only.plan(2, 8, 11)
    assert plan.segments == 2
    whole = weight_only.Plan(plan.tile, 1)
    for threshold in (None, 2.0):
        results = [int8.launch(cut, x, weight, torch.rand(8) * 0 + 0.01, bias, threshold) for cut in (plan, whole)]
        torch.testing.assert_close(*results, rtol=0 if threshold is None else 1e-5, atol=0 if threshold is None else 1e-4)
