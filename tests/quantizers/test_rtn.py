"""Round to nearest against compressed-tensors, an independent implementation: the same scales, zero points and integers."""

from itertools import product

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizers.activations import quantize_tokens
from quantizers.errors import QuantizationFailed
from quantizers.methods.rtn import quantize_nearest
from quantizers.packing import unpack
from quantizers.scheme import IntegerScheme, parse_scheme
from quantizers.tensors import TensorSource
from quantizers.weights import QuantizedWeight, is_plain_int8

HALF_STEP = 0.5 + 1e-3  # of a scale: nearest code, plus what the fp16 rounding of a scale moves the ends of the range


def scheme_of(slug: str) -> IntegerScheme:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme)
    return scheme


def signed_codes(weight: QuantizedWeight) -> torch.Tensor:
    """As compressed-tensors counts them: from -2^(b-1), whatever the zero."""
    assert isinstance(weight.scheme, IntegerScheme)
    codes = weight.tensors["codes"]
    if is_plain_int8(weight.scheme):
        return codes.int()
    return unpack(codes, weight.scheme.weight_bits, weight.in_features).int() - (1 << (weight.scheme.weight_bits - 1))


@pytest.mark.parametrize("slug", [f"w{b}{g}{z}" for b, g, z in product("2348", ("", "g32", "g64", "g128"), ("", "z"))])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])  # groups of one sign too: 0 stays in range
def test_scales_zero_points_and_integers_are_compressed_tensors(slug: str, shift: float) -> None:
    scheme = scheme_of(slug)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) + shift
    weight[5] = 0
    weight[6, :128] = 0
    args = QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    grouped = weight.view(48, -1, scheme.group_size or 256)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    ours = quantize_nearest(weight, scheme, layer="layer")
    some = grouped.abs().amax(-1) > 0  # a group of zeros has any scale
    assert torch.equal(ours.tensors["scale"][some], scale.half()[some])
    if not scheme.symmetric:
        middle = 1 << (scheme.weight_bits - 1)
        assert torch.equal(ours.tensors["zero_point"].int()[some] - middle, zero_point.int()[some])
    step = scale if scheme.symmetric else scale.half().float()
    theirs = quantize(weight, torch.where(some, step, 1.0), zero_point, args, dtype=torch.int8).int()
    rows = some.all(-1)
    assert torch.equal(signed_codes(ours)[rows], theirs[rows])
    assert ours.dequantize()[5].abs().max() == 0


def test_dynamic_tokens_are_compressed_tensors() -> None:
    tokens = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    args = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(tokens[None], args, torch.nn.Identity())
    codes, ours = quantize_tokens(tokens)
    assert torch.equal(ours, scale[0])
    assert torch.equal(codes.float() * ours, fake_quantize(tokens[None], scale, zero_point, args)[0])


def test_a_token_of_zeros_has_codes_of_zero() -> None:
    codes, scale = quantize_tokens(torch.zeros(2, 8))
    assert not codes.any() and bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


@given(
    values=hnp.arrays("float32", (2, 32), elements=st.floats(-1e4, 1e4, width=32)),
    slug=st.sampled_from([f"w{b}g32{z}" for b, z in product("2348", ("", "z", "m"))]),
)
@example(values=np.full((2, 32), 2**-23, np.float32), slug="w2g32")  # the scale is the smallest that fp16 has
def test_every_weight_gets_the_nearest_code(values: object, slug: str) -> None:
    weight, scheme = torch.tensor(values), scheme_of(slug)
    ours = quantize_nearest(weight, scheme, layer="layer")
    step = ours.tensors["scale"].float().max()
    error = (ours.dequantize() - weight).abs().max()
    # A zero point is rounded too, a minimum is off by fp16's rounding, and the symmetric range lacks half a step at its top.
    allowed = step * (2 * HALF_STEP if scheme.zero == "integer" else HALF_STEP) + weight.abs().max() * 2**-10
    if step < 2**-14:  # a scale that is subnormal in fp16 is off by up to 2^-25, and a weight by as much for each step of its code
        allowed += 2**-25 * 2 ** (scheme.weight_bits - scheme.symmetric)
    assert error <= allowed


def test_minimums_reproduce_the_demo_exactly(demo_tensors: TensorSource) -> None:
    """Its layers were made from a Q4_1 file. Integer zero points cannot: their error shows that the format, not the test, is exact."""
    names = [name for name in demo_tensors.keys() if "layers" in name and len(demo_tensors.shape(name)) == 2]  # noqa: SIM118
    assert len(names) == 210
    for name in names[::9]:
        weight = demo_tensors.get(name)
        assert torch.equal(quantize_nearest(weight, scheme_of("w4g32m"), layer=name).dequantize(), weight), name
        assert not torch.equal(quantize_nearest(weight, scheme_of("w4g32z"), layer=name).dequantize(), weight), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("slug", ["w4g32", "w4g32z", "w4g32m", "w8"])
def test_weights_that_are_not_finite_fail_with_the_layers_name(slug: str, bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(QuantizationFailed, match=r"^blocks\.3\.q_proj: .*NaN or infinity") as failure:
        quantize_nearest(weight, scheme_of(slug), layer="blocks.3.q_proj")
    assert failure.value.layer == "blocks.3.q_proj"


@pytest.mark.parametrize("slug", ["w2g32", "w2g32z", "w4g32m"])
def test_a_scale_beyond_fp16_fails(slug: str) -> None:
    with pytest.raises(QuantizationFailed, match="beyond fp16"):
        quantize_nearest(torch.full((2, 32), 3e5) * torch.linspace(-1, 1, 32), scheme_of(slug), layer="layer")


@pytest.mark.parametrize("slug", ["w4g32", "w4g32z", "w4g32m", "w8"])
def test_a_scale_below_fp16_is_held_above_zero(slug: str) -> None:
    ours = quantize_nearest(torch.randn(2, 64) * 1e-12, scheme_of(slug), layer="layer")
    assert bool((ours.tensors["scale"] > 0).all()) and bool(torch.isfinite(ours.dequantize()).all())


def test_a_ragged_last_group_fails_with_the_choices() -> None:
    with pytest.raises(QuantizationFailed, match=r"^proj: its 576 inputs .* group size 128: choose g32, g64, no group"):
        quantize_nearest(torch.randn(4, 576), scheme_of("w4g128"), layer="proj")
