"""Weight-only products against fp64 arithmetic on the reference's weights: every width and grid, ragged shapes, ends of ranges."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_weights import random_weight

from quantizers.kernels import KERNELS, LayerKind
from quantizers.kernels.cuda import layout
from quantizers.packing import pack
from quantizers.scheme import BnbScheme, IntegerScheme, parse_scheme
from quantizers.weights import QuantizedWeight, is_plain_int8

CPU = torch.device("cpu")
SUM = 2.0**-20  # of the sum of magnitudes: fp32 sums of a few hundred products
# One rounding of the result. The interpreter cuts bf16 off where a device rounds.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-6}


def run(weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    name = "triton-code-book" if isinstance(weight.scheme, BnbScheme) else "triton-weight-only"
    kernel = KERNELS[name](LayerKind(weight.scheme, weight.out_features, weight.in_features, x.dtype, CPU))
    buffers = kernel.prepare(weight)
    assert {key: (tuple(buffer.shape), buffer.dtype) for key, buffer in buffers.items()} == kernel.specs()
    return kernel.run(x, buffers, bias)


def check(weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    y = run(weight, x, bias)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.out_features)
    numbers = weight.dequantize().double()
    exact = x.double() @ numbers.T + (0 if bias is None else bias.double())
    rounding = ROUNDING[x.dtype] if isinstance(weight.scheme, BnbScheme) else 0  # of the numbers of a code book
    allowed = ROUNDING[x.dtype] * exact.abs() + (SUM + rounding) * (x.double().abs() @ numbers.abs().T)
    assert ((y.double() - exact).abs() <= allowed + 2.0**-24).all()  # 2^-24: the smallest fp16


FORMATS = [f"w{bits}{group}{zero}" for bits, group, zero in product("2348", ("", "g32", "g64", "g128"), ("", "z", "m"))]


@pytest.mark.parametrize("slug", [*FORMATS, "nf4", "fp4"])
def test_products_are_those_of_the_references_weights(slug: str) -> None:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme | BnbScheme)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 256, generator=generator).half()
    check(random_weight(scheme, 10, 256), x, torch.randn(10, generator=generator).half())


@pytest.mark.parametrize(
    ("slug", "rows", "columns", "tokens"),
    [
        ("w4g32", 1, 32, 1),  # half of a span
        ("w2g32z", 70, 96, 17),  # two tiles of rows; three quarters of a span; two tiles of tokens
        ("w3g32m", 65, 160, 3),
        ("w4", 3, 100, 2),  # a row that no span and no byte divides
        ("w3z", 5, 37, 1),
        ("w2", 2, 1, 1),
        ("w8", 7, 33, 33),
        ("w8g32z", 130, 64, 65),  # tiles of 128 rows
        ("nf4", 3, 192, 2),
    ],
)
def test_ragged_shapes(slug: str, rows: int, columns: int, tokens: int) -> None:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme | BnbScheme)
    check(random_weight(scheme, rows, columns), torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).half())


@pytest.mark.parametrize("slug", ["w4g32", "w3g64z", "w8m", "nf4"])
def test_bf16_inputs(slug: str) -> None:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme | BnbScheme)
    generator = torch.Generator().manual_seed(3)
    check(
        random_weight(scheme, 9, 128), torch.randn(3, 128, generator=generator).bfloat16(), torch.randn(9, generator=generator).bfloat16()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["none", "integer", "minimum"])
def test_the_ends_of_the_ranges(bits: int, zero: str) -> None:
    """The largest and the smallest code under the largest scale of fp16, its smallest, and none."""
    scheme = IntegerScheme(weight_bits=bits, group_size=32, zero=zero)  # type: ignore[arg-type]
    weight = random_weight(scheme, 4, 96)
    top = (1 << bits) - 1
    ends = torch.tensor([0, top], dtype=torch.uint8).repeat(4, 48)
    codes = (ends ^ 0x80).view(torch.int8) if is_plain_int8(scheme) else pack(ends, bits)
    tensors = weight.tensors | {
        "codes": codes,
        "scale": torch.tensor([[65504.0, 2.0**-24, 0.0]] * 4).half() / torch.tensor([[256, 1, 1]]).half(),
    }
    if zero == "integer":
        tensors["zero_point"] = torch.tensor([[0, top, top]] * 4, dtype=torch.uint8)
    x = torch.full((1, 96), 2.0**-6).half()
    x[:, 1::2] = 0
    check(QuantizedWeight(scheme, 4, 96, tensors), x)


def test_what_is_not_a_number_stays_with_its_token() -> None:
    weight = random_weight(IntegerScheme(weight_bits=4, group_size=32), 8, 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(4)).half()
    clean = run(weight, x)
    x[1, 5] = float("nan")
    spoiled = run(weight, x)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_one_program_and_several_make_the_same_sums() -> None:
    """A few tokens split the row over programs, many do not."""
    from quantizers.kernels.cuda import weight_only

    scheme = IntegerScheme(weight_bits=8, group_size=32)
    layer = random_weight(scheme, 8, 416)
    buffers = KERNELS["triton-weight-only"](LayerKind(scheme, 8, 416, torch.float16, CPU)).prepare(layer)
    weight = layout.Weight(8, 416, 8, layout.SYMMETRIC, 32, buffers["low"], None, buffers["scale"], None)
    x = torch.randn(2, 416, generator=torch.Generator().manual_seed(5)).half()
    bias = torch.randn(8, generator=torch.Generator().manual_seed(6)).half()
    plan = weight_only.plan(2, 8, 13)
    assert plan.segments == 3, "13 spans in pieces of 5, 5 and 3"
    whole = weight_only.Plan(plan.tile, 1)
    torch.testing.assert_close(weight_only.launch(plan, x, weight, bias), weight_only.launch(whole, x, weight, bias), rtol=1e-3, atol=1e-5)


@given(tokens=st.integers(1, 64), rows=st.integers(1, 200_000), spans=st.integers(1, 1000))
def test_a_layers_shape_decides_the_order_of_sums_of_decoding(tokens: int, rows: int, spans: int) -> None:
    from quantizers.kernels.cuda import weight_only

    plan = weight_only.plan(tokens, rows, spans)
    assert plan.segments == weight_only.plan(1, rows, spans).segments
    assert (plan.segments - 1) * -(-spans // plan.segments) < spans, "no segment is empty"
