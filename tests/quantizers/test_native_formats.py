"""The native kernels of code books and of fp8 against the numbers that they are packed from, each other, and hostile inputs."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.kernels import KERNELS, Kernel, LayerKind, select
from quantizers.kernels.cpu import library
from quantizers.kernels.native_codebook import BOOKS
from quantizers.methods.bnb import quantize_bnb
from quantizers.methods.rtn import quantize_minifloat
from quantizers.minifloat import e4m3_values
from quantizers.scheme import BnbScheme, MinifloatScheme, parse_scheme
from quantizers.weights import QuantizedWeight, block_absmax
from tests.quantizers.test_native_linear import (
    SUM_ERROR,
    assert_alike_in_any_company,
    available,
    relative,
    restore,  # noqa: F401  after every test here too
    rounded_by_32,
)

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native kernels are {library.missing()}")

CODEBOOKS = ("nf4", "fp4", "nf4dq", "fp4dq", "mxfp4", "nvfp4")
FORMATS = (*CODEBOOKS, "fp8")
# Of a product, where the levels of NF4 and FP4 are rounded to integers (0.5 and 0.3 %) and inputs to 8 bits (0.8 % of a normal one).
LEVELS_ROUNDED = 1.1e-2


def quantized(slug: str, weight: Tensor) -> QuantizedWeight:
    scheme = parse_scheme(slug)
    if isinstance(scheme, BnbScheme):
        return quantize_bnb(weight, scheme, layer="layer")
    assert isinstance(scheme, MinifloatScheme)
    return quantize_minifloat(weight, scheme, layer="layer")


def layer(slug: str, rows: int, columns: int, seed: int = 0) -> tuple[Kernel, dict[str, Tensor], QuantizedWeight]:
    return prepared(slug, torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def prepared(slug: str, values: Tensor) -> tuple[Kernel, dict[str, Tensor], QuantizedWeight]:
    weight = quantized(slug, values)
    kernel = select(LayerKind(weight.scheme, *values.shape, torch.float32, torch.device("cpu")))
    assert kernel.name == ("native-cpu-fp8" if slug == "fp8" else "native-cpu-codebook-a8g32")
    return kernel, kernel.prepare(weight), weight


def executed(weight: QuantizedWeight) -> Tensor:
    """The weight as the kernel reads it, fp64: whole multiples of the levels' unit and, for NF4 and FP4, scales of eleven bits."""
    if isinstance(weight.scheme, MinifloatScheme):
        return weight.dequantize().double()
    book = BOOKS[weight.scheme.format]
    codes = weight.tensors["codes"]
    levels = torch.tensor(book.whole)[torch.stack((codes >> 4, codes & 15), -1).view(-1).int()].view(weight.out_features, -1)
    absmax = block_absmax(weight.scheme, weight.tensors).view(weight.out_features, -1, 1)
    return (levels.view(weight.out_features, -1, 64) * book.unit * absmax.half().double()).view(weight.out_features, -1)


@pytest.mark.parametrize("slug", CODEBOOKS)
def test_a_code_book_is_its_levels_times_the_rounded_input(slug: str) -> None:
    kernel, buffers, weight = layer(slug, 50, 384)  # 50 rows: the last block is ragged
    x = torch.randn(19, 384)
    assert relative(kernel.run(x, buffers, None), rounded_by_32(x) @ executed(weight).T) < SUM_ERROR


@pytest.mark.parametrize("slug", CODEBOOKS)
def test_a_code_book_is_near_the_definition_of_its_format(slug: str) -> None:
    kernel, buffers, weight = layer(slug, 64, 512)
    x = torch.randn(9, 512)
    assert relative(kernel.run(x, buffers, None), x.double() @ weight.dequantize().double().T) < LEVELS_ROUNDED


def test_levels_of_e2m1_are_exact_and_those_of_bitsandbytes_within_half_a_unit() -> None:
    for name, book in BOOKS.items():
        error = max(abs(whole * book.unit - level) for whole, level in zip(book.whole, book.levels, strict=True))
        assert error == 0 if name in ("mxfp4", "nvfp4") else error <= book.unit / 2
        assert all(-128 <= whole <= 127 for whole in book.whole)


@pytest.mark.parametrize("slug", FORMATS)
def test_results_do_not_depend_on_batch_threads_or_instruction_set(slug: str) -> None:
    kernel, buffers, _ = layer(slug, 50, 256)
    assert_alike_in_any_company(kernel, buffers)


@given(rows=st.integers(1, 70), tokens=st.integers(1, 20), groups=st.integers(1, 5), slug=st.sampled_from(FORMATS), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_ragged_shapes(rows: int, tokens: int, groups: int, slug: str, seed: int) -> None:
    kernel, buffers, weight = layer(slug, rows, (32 if slug in ("mxfp4", "nvfp4", "fp8") else 64) * groups, seed)
    x = torch.randn(tokens, kernel.layer.in_features, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    if slug == "fp8":
        reference = KERNELS["reference"](kernel.layer)
        expected = reference.run(x, reference.prepare(weight), None).double()
    else:
        expected = rounded_by_32(x) @ executed(weight).T
    error = (kernel.run(x, buffers, None).double() - expected).abs().max()
    assert error < SUM_ERROR * (x.norm() * weight.dequantize().norm())


def test_every_number_of_e4m3_is_read_as_torch_reads_it() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    matrix = torch.zeros(len(codes), 32, dtype=torch.uint8)
    matrix[:, 5] = codes
    scheme = MinifloatScheme(format="fp8")
    weight = QuantizedWeight(scheme, len(codes), 32, {"codes": matrix, "scale": torch.ones(len(codes), 1)})
    kernel = select(LayerKind(scheme, len(codes), 32, torch.float32, torch.device("cpu")))
    x = torch.zeros(3, 32)
    x[:, 5] = 448.0  # scale 1
    for name in available():
        library.select_instruction_set(name)
        y = kernel.run(x, kernel.prepare(weight), None)
        assert torch.equal(y, (448 * e4m3_values(codes)).expand(3, -1))


def test_tokens_are_rounded_to_e4m3_as_torch_rounds_them() -> None:
    """Through a unit matrix, so that every number comes out alone: ties, subnormal numbers, both signs, any size of token."""
    kernel, buffers, weight = prepared("fp8", torch.eye(64))
    reference = KERNELS["reference"](kernel.layer)
    generator = torch.Generator().manual_seed(8)
    ties = torch.tensor([(1 + (2 * eighth + 1) / 16) * 2.0**power for eighth in range(8) for power in range(-9, 8)])[:63]
    x = torch.randn(40, 64, generator=generator) * torch.logspace(-6, 2, 64)
    x[0] = torch.cat((ties, torch.tensor([448.0])))
    x[1] = -x[0] * 2.0**-9
    for name in available():
        library.select_instruction_set(name)
        assert torch.equal(kernel.run(x, buffers, None), reference.run(x, reference.prepare(weight), None)), name


@pytest.mark.parametrize("slug", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_nan_and_stays_in_its_row(slug: str, bad: float) -> None:
    kernel, buffers, _ = layer(slug, 20, 64)
    x = torch.randn(9, 64)
    clean = kernel.run(x, buffers, None)
    x[4, 37] = bad
    for name in available():
        library.select_instruction_set(name)
        y = kernel.run(x, buffers, None)
        assert y[4].isnan().all()
        assert torch.equal(y[:4], clean[:4]) and torch.equal(y[5:], clean[5:])
        assert kernel.run(x[4], buffers, None).isnan().all()


@pytest.mark.parametrize("slug", FORMATS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e30])
def test_extreme_inputs_give_no_nan(slug: str, magnitude: float) -> None:
    kernel, buffers, _ = layer(slug, 20, 64)
    y = kernel.run(torch.full((3, 64), magnitude), buffers, None)
    assert not y.isnan().any()
    assert magnitude > 1e-30 or (y.abs() < 1e-28).all()


@pytest.mark.parametrize("slug", FORMATS)
def test_a_weight_of_zeros_gives_zeros(slug: str) -> None:
    kernel, buffers, _ = prepared(slug, torch.zeros(16, 64))
    assert torch.equal(kernel.run(torch.randn(3, 64), buffers, None), torch.zeros(3, 16))


@pytest.mark.parametrize("slug", ["nf4", "fp4", "mxfp4", "fp8"])
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1.0, 1e6, 1e20])
def test_rows_of_very_different_sizes_keep_their_precision(slug: str, size: float) -> None:
    """Scales of four orders of magnitude in a matrix, wherever it lies: fp16 alone would lose them."""
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 0, 20).unsqueeze(-1) * size
    kernel, buffers, weight = prepared(slug, values)
    reference = KERNELS["reference"](kernel.layer)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    found, expected = kernel.run(x, buffers, None).double(), reference.run(x, reference.prepare(weight), None).double()
    assert ((found - expected).norm(dim=0) / expected.norm(dim=0)).max() < 0.05


@pytest.mark.parametrize(("slug", "size"), [("mxfp4", 6.0), ("nvfp4", 6.0 * 448)])  # their scales and factors are exact
def test_the_largest_codes_of_the_largest_inputs_are_summed_exactly(slug: str, size: float) -> None:
    values = torch.full((16, 1024), size)
    kernel, buffers, weight = prepared(slug, values)
    assert torch.equal(weight.dequantize(), values)
    for name in available():
        library.select_instruction_set(name)
        for sign in (1, -1):
            assert torch.equal(
                kernel.run(torch.full((2, 1024), 127.0 * sign), buffers, None), torch.full((2, 16), 127.0 * sign * 1024 * size)
            )


@pytest.mark.parametrize(("slug", "bits"), [("nf4", 4.25), ("fp4dq", 4.25), ("mxfp4", 4.25), ("nvfp4", 4.5), ("fp8", 8 + 32 / 256)])
def test_bytes_are_the_layout_s(slug: str, bits: float) -> None:
    kernel, buffers, _ = layer(slug, 64, 256)
    header = 0 if slug == "fp8" else library.HEADER_BYTES
    assert (buffers["packed"].nbytes - header) * 8 / (64 * 256) == bits
    assert buffers["packed"].data_ptr() % 64 == 0
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in buffers.items()} == kernel.specs()


@pytest.mark.parametrize("slug", FORMATS)
@pytest.mark.parametrize("rows", [1, 50, 64])
def test_the_library_and_python_agree_on_bytes(slug: str, rows: int) -> None:
    matrix = select(LayerKind(parse_scheme(slug), rows, 192, torch.float32, torch.device("cpu"))).matrix(0, None)  # type: ignore[arg-type, attr-defined]
    assert library.library().precis_packed_bytes(matrix) == library.packed_bytes(matrix)


def test_a_packed_matrix_is_what_the_drawing_says() -> None:
    """NVFP4, row 5 of one block: input 22 in vector 2 of the codes, its group's scale in the second half of the tail."""
    values = torch.zeros(16, 32)
    values[5, 22], values[5, 3] = -6.0, 3.0
    _, buffers, weight = prepared("nvfp4", values)
    packed = bytes(buffers["packed"].tolist())
    *levels, factor = struct.unpack_from("16Bf", packed)
    assert levels == [128 + 2 * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)] + [
        128 - 2 * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    ]
    assert factor == pytest.approx(0.5 * 256 / weight.tensors["global_scale"].item(), rel=2**-23)  # it is stored in fp32
    codes, tail = packed[64 : 64 + 256], packed[64 + 256 :]
    assert {at: code for at, code in enumerate(codes) if code} == {4 * 5 + 3: 7, 64 * 2 + 4 * 5 + 22 % 4: 0xF0}
    assert len(tail) == 32 and (tail[5], tail[16 + 5]) == tuple(weight.tensors["scale"][5].tolist())


@pytest.mark.parametrize(("slug", "columns"), [("nf4", 96), ("fp4dq", 32), ("mxfp4", 1 << 17), ("fp8", 48)])
def test_what_is_not_supported_goes_to_another_kernel(slug: str, columns: int) -> None:
    assert not select(LayerKind(parse_scheme(slug), 16, columns, torch.float32, torch.device("cpu"))).name.startswith("native-cpu")  # type: ignore[arg-type]
