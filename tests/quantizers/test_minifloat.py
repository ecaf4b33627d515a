"""Float formats: bytes worked by hand, the formulas of their specifications, and compressed-tensors as an independent implementation."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantizers.errors import CorruptData, QuantizationFailed
from quantizers.kernels import KERNELS, LayerKind
from quantizers.methods.rtn import quantize_minifloat
from quantizers.minifloat import (
    E2M1,
    e2m1_codes,
    e2m1_values,
    e4m3_codes,
    e4m3_values,
    e8m0_codes,
    e8m0_values,
    quantize_tokens_e4m3,
)
from quantizers.scheme import MinifloatScheme
from quantizers.weights import QuantizedWeight, tensor_specs

FP8, MXFP4, NVFP4 = (MinifloatScheme(format=name) for name in ("fp8", "mxfp4", "nvfp4"))


def weight_of(rows: int = 48, columns: int = 256) -> torch.Tensor:
    """Normal numbers in blocks of very different sizes, a row and a block of zeros, and blocks at every fraction of a power of two."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight *= torch.logspace(-3, 1, rows).unsqueeze(-1)
    weight[5] = 0
    weight[6, :32] = 0
    weight[7] = torch.linspace(-2, 2, columns)
    return weight


def test_e4m3_is_its_formula() -> None:
    for code in range(256):
        sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
        value = e4m3_values(torch.tensor([code], dtype=torch.uint8)).item()
        if code & 0x7F == 0x7F:
            assert value != value
        else:
            expected = 2.0**-6 * fraction / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8)
            assert value == (-1) ** sign * expected
            assert e4m3_codes(torch.tensor([value])).item() == code or value == 0


def test_e2m1_is_its_formula() -> None:
    for code in range(16):
        sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
        expected = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
        assert e2m1_values(torch.tensor([code], dtype=torch.uint8)).item() == (-1) ** sign * expected


def test_e2m1_rounds_ties_to_the_even_code_and_saturates() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    assert e2m1_values(e2m1_codes(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert e2m1_values(e2m1_codes(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


@given(values=hnp.arrays("float32", 64, elements=st.floats(-6, 6, width=32)))
def test_e2m1_is_the_nearest_number(values: object) -> None:
    x = torch.tensor(values)
    numbers = torch.tensor([*E2M1, *(-value for value in E2M1)])
    nearest = (x.unsqueeze(-1) - numbers).abs().amin(-1)
    assert torch.equal((e2m1_values(e2m1_codes(x)) - x).abs(), nearest)


def test_e8m0_worked_by_hand() -> None:
    """floor(log2) - 2, and one more from 7/4 of a power of two on; 127 stands for 2^0."""
    largest = torch.tensor([1.0, 1.5, 1.7499, 1.75, 4.0, 6.0, 6.99, 7.0, 8.0, 0.0, 2.0**-126, 3e38])
    assert e8m0_codes(largest).tolist() == [125, 125, 125, 126, 127, 127, 127, 128, 128, 127, 0, 253]
    codes = torch.tensor([0, 1, 127, 254], dtype=torch.uint8)
    assert e8m0_values(codes).tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]


def test_mxfp4_bytes_worked_by_hand() -> None:
    """A row of 1 2 3 4 -6 and zeros: the largest, 6, is 1.5 * 2^2, so the shared exponent is 0; codes 2 4 5 6 15, the first one low."""
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([1.0, 2.0, 3.0, 4.0, -6.0])
    ours = quantize_minifloat(weight, MXFP4, layer="layer")
    assert ours.tensors["scale"].tolist() == [[127]]
    assert ours.tensors["codes"].tolist() == [[0x42, 0x65, 0x0F, *[0] * 13]]
    assert torch.equal(ours.dequantize(), weight)


def test_nvfp4_bytes_worked_by_hand() -> None:
    """Two blocks, the largest weights 12 and 3: global scale 448 * 6 / 12 = 224, scales 2 * 224 = 448 (0x7e) and 0.5 * 224 = 112 (0x6e)."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1], weight[0, 16] = 12.0, -2.0, 3.0
    ours = quantize_minifloat(weight, NVFP4, layer="layer")
    assert ours.tensors["global_scale"].tolist() == [224.0]
    assert ours.tensors["scale"].tolist() == [[0x7E, 0x6E]]
    assert ours.tensors["codes"].tolist() == [[0xA7, *[0] * 7, 0x07, *[0] * 7]]  # 6 and -1, and 6
    assert torch.equal(ours.dequantize(), weight)


def test_fp8_bytes_worked_by_hand() -> None:
    """The largest, 7, becomes 448 = 2^8 * 1.75 (0 1111 110); its scale is 7 / 448 = 2^-6, so 0.5 becomes 32 = 2^5 (0 1100 000)."""
    ours = quantize_minifloat(torch.tensor([[-7.0, 0.5, 0.0]]), FP8, layer="layer")
    assert ours.tensors["scale"].tolist() == [[2.0**-6]]
    assert ours.tensors["codes"].tolist() == [[0xFE, 0x60, 0x00]]
    assert ours.dequantize().tolist() == [[-7.0, 0.5, 0.0]]


@pytest.mark.parametrize(("scheme", "expected"), [(FP8, 8 + 32 / 4096), (MXFP4, 4.25), (NVFP4, 4.5)])
def test_bits_a_weight_are_those_that_are_stored(scheme: MinifloatScheme, expected: float) -> None:
    specs = tensor_specs(scheme, 1024, 4096)
    held = sum(torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in specs.items() if name != "global_scale")
    assert held * 8 / (1024 * 4096) == scheme.bits_per_weight(4096) == expected


def peer(preset: str) -> object:
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    return scheme.preset_name_to_scheme(preset, ["Linear"]).weights


def test_fp8_is_compressed_tensors() -> None:
    args = peer("FP8_DYNAMIC")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weight_of()
    scale, zero = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), args)
    ours = quantize_minifloat(weight, FP8, layer="layer")
    some = weight.abs().amax(-1) > 0  # a row of zeros has any scale
    assert torch.equal(ours.tensors["scale"][some], scale[some])
    theirs = quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(ours.tensors["codes"][some], theirs[some])
    assert not ours.dequantize()[5].any()


def test_mxfp4_is_compressed_tensors_to_the_byte() -> None:
    args = peer("MXFP4A16")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weight_of()
    blocks = weight.view(48, -1, 32)
    some = blocks.abs().amax(-1) > 0
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    ours = quantize_minifloat(weight, MXFP4, layer="layer")
    assert torch.equal(e8m0_values(ours.tensors["scale"])[some], scale[some])
    packed = pack_fp4_to_uint8(quantize(weight, scale, zero, args)).view(48, -1, 16)
    assert torch.equal(ours.tensors["codes"].view(48, -1, 16)[some], packed[some])


def test_nvfp4_is_compressed_tensors_to_the_byte() -> None:
    args = peer("NVFP4A16")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = weight_of()
    weight[9:] *= 100  # so that no scale of a block is rounded to zero, where the two differ
    blocks = weight.view(48, -1, 16)
    some = blocks.abs().amax(-1) > blocks.abs().max() / 6 / 448 / 100
    global_scale = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale)
    ours = quantize_minifloat(weight, NVFP4, layer="layer")
    assert torch.equal(ours.tensors["global_scale"], global_scale)
    assert torch.equal(e4m3_values(ours.tensors["scale"])[some], scale.float()[some])
    packed = pack_fp4_to_uint8(quantize(weight, scale, zero, args, global_scale=global_scale))
    assert torch.equal(ours.tensors["codes"].view(48, -1, 8)[some], packed.view(48, -1, 8)[some])
    values = unpack_fp4_from_uint8(packed, 48, 256, dtype=torch.float32)
    theirs = dequantize(values, scale.float(), args=args, global_scale=global_scale, dtype=torch.float32).view(48, -1, 16)
    assert torch.equal(ours.dequantize().view(48, -1, 16)[some], theirs[some])


def test_tokens_are_compressed_tensors() -> None:
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = scheme.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).input_activations
    tokens = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    scale, zero = compute_dynamic_scales_and_zp(tokens[None], args, torch.nn.Identity())
    numbers, ours = quantize_tokens_e4m3(tokens)
    assert torch.equal(ours, scale[0])
    assert torch.equal(numbers * ours, fake_quantize(tokens[None], scale, zero, args)[0])


def test_the_product_of_fp8_is_exact_on_the_rounded_numbers() -> None:
    weight, x = weight_of(20, 128), torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    x[2] = 0
    stored = quantize_minifloat(weight, FP8, layer="layer")
    numbers, scale = quantize_tokens_e4m3(x)
    kernel = KERNELS["reference"](LayerKind(FP8, 20, 128, torch.float32, torch.device("cpu")))
    expected = (numbers * scale).double() @ stored.dequantize().double().T
    torch.testing.assert_close(kernel.run(x, kernel.prepare(stored), None).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scheme", "magnitude"), list(product((FP8, MXFP4, NVFP4), (0.0, 1e-45, 1e-38, 1e-30, 1e30, 2.9e38))))
def test_extreme_weights_stay_finite(scheme: MinifloatScheme, magnitude: float) -> None:
    weight = torch.linspace(-1, 1, 64).repeat(3, 1) * magnitude
    values = quantize_minifloat(weight, scheme, layer="layer").dequantize()
    assert bool(torch.isfinite(values).all()) and values.abs().max() <= 1.2 * magnitude + 1e-37
    if 1e-30 <= magnitude <= 1e30:
        assert (values - weight).double().norm() < 0.2 * weight.double().norm()


@pytest.mark.parametrize("scheme", [FP8, MXFP4, NVFP4], ids=lambda scheme: scheme.slug)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_fail_with_the_layers_name(scheme: MinifloatScheme, bad: float) -> None:
    weight = weight_of()
    weight[2, 3] = bad
    with pytest.raises(QuantizationFailed, match=r"^blocks\.3\.q_proj: .*NaN or infinity"):
        quantize_minifloat(weight, scheme, layer="blocks.3.q_proj")


@pytest.mark.parametrize(("scheme", "columns"), [(MXFP4, 48), (NVFP4, 40)])
def test_blocks_that_do_not_fit_are_refused(scheme: MinifloatScheme, columns: int) -> None:
    with pytest.raises(QuantizationFailed, match=rf"^proj: its {columns} inputs are not a multiple of the {scheme.group_size}"):
        quantize_minifloat(torch.randn(4, columns), scheme, layer="proj")


@pytest.mark.parametrize(("scheme", "name", "bits"), [(FP8, "codes", 0xFF), (MXFP4, "scale", 0xFF), (NVFP4, "scale", 0x7F)])
def test_a_stored_nan_is_refused(scheme: MinifloatScheme, name: str, bits: int) -> None:
    stored = quantize_minifloat(weight_of(), scheme, layer="layer")
    stored.tensors[name][3, 1] = bits
    with pytest.raises(CorruptData, match="not finite"):
        QuantizedWeight(scheme, 48, 256, stored.tensors)


@pytest.mark.parametrize(("scheme", "most"), [(FP8, 0.03), (MXFP4, 0.13), (NVFP4, 0.1)], ids=["fp8", "mxfp4", "nvfp4"])
def test_the_error_is_that_of_the_format(scheme: MinifloatScheme, most: float) -> None:
    """Of normal numbers: three bits of fraction leave 2.6 %; a scale for 16 loses less than a power of two for 32."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(7))
    error = (quantize_minifloat(weight, scheme, layer="layer").dequantize() - weight).norm() / weight.norm()
    assert most / 2 < error < most
