"""Every kernel against the reference, over every format that it supports; and the reference against fp64 arithmetic on what is stored."""

from itertools import product

import pytest
import torch

from quantizers.activations import quantize_tokens
from quantizers.kernels import KERNELS, Kernel, LayerKind, select
from quantizers.kernels.reference import exact_int8_product
from quantizers.methods.bnb import quantize_bnb
from quantizers.methods.rtn import quantize_minifloat, quantize_nearest
from quantizers.scheme import IntegerScheme, MinifloatScheme, parse_scheme
from quantizers.weights import QuantizedScheme, QuantizedWeight

CPU = torch.device("cpu")
INTEGER = [f"w{b}{g}{z}" for b, g, z in product("2348", ("", "g32", "g64", "g128"), ("", "z", "m"))]
INT8_TOKENS = [f"w{b}{g}{z}a8" for b, g, z in product("2348", ("", "g64"), ("", "z"))]
INT8 = ("int8", "int8t0", "int8t3")
MINIFLOAT = ("fp8", "mxfp4", "nvfp4")
FORMATS = [*INTEGER, *INT8_TOKENS, *INT8, "nf4", "fp4", "nf4dq", "fp4dq", *MINIFLOAT]
SHAPES = [(64, 256), (48, 128), (10, 128), (8192, 1024)]  # rows by 32, by 16, by neither; one as large as an output matrix
# Relative error, Frobenius: weights, scales and the result rounded to bf16 (2^-9 each); or to fp32, where bitsandbytes writes 1/127^2
# with its last digits wrong by 1.8e-5.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 2e-5}
# A kernel whose name says that it rounds its inputs too, each 32 to 8 bits: half a step of absmax/127 is about 0.008 of a normal input.
INPUTS_ROUNDED = {"native-cpu-a8g32": 1e-2, "native-cpu-codebook-a8g32": 1.1e-2}


def quantized(slug: str, shape: tuple[int, int]) -> tuple[QuantizedScheme, QuantizedWeight]:
    scheme = parse_scheme(slug)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.05 + 0.01
    if isinstance(scheme, IntegerScheme):
        return scheme, quantize_nearest(weight, scheme, layer="layer")
    if isinstance(scheme, MinifloatScheme):
        return scheme, quantize_minifloat(weight, scheme, layer="layer")
    return scheme, quantize_bnb(weight, scheme, layer="layer")  # type: ignore[arg-type]


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def run(kernel: type[Kernel], kind: LayerKind, weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    instance = kernel(kind)
    buffers = instance.prepare(weight)
    specs = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
    assert specs == instance.specs(), "bytes are predicted from the specs"
    return instance.run(x, buffers, bias)


@pytest.mark.parametrize("slug", [slug for slug in FORMATS if slug not in (*INT8, *INT8_TOKENS, "fp8")])
def test_the_reference_multiplies_by_the_dequantized_weight(slug: str) -> None:
    scheme, weight = quantized(slug, (10, 128))
    x, bias = torch.randn(2, 3, 128), torch.randn(10)
    y = run(KERNELS["reference"], LayerKind(scheme, 10, 128, torch.float32, CPU), weight, x, bias)
    assert y.shape == (2, 3, 10)
    assert relative(y, x.double() @ weight.dequantize().double().T + bias) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("slug", INT8_TOKENS)
def test_the_reference_multiplies_rounded_tokens_by_the_dequantized_weight(slug: str) -> None:
    scheme, weight = quantized(slug, (10, 256))
    x, bias = torch.randn(2, 3, 256), torch.randn(10)
    x[0, 1] = 0
    codes, step = quantize_tokens(x.view(6, 256))  # itself held to compressed-tensors
    rounded = (codes.double() * step).view(2, 3, 256)
    y = run(KERNELS["reference"], LayerKind(scheme, 10, 256, torch.float32, CPU), weight, x, bias)
    assert relative(y, rounded @ weight.dequantize().double().T + bias) < 1e-6


CASES = [
    (name, slug, shape, dtype)
    for name, slug, shape, dtype in product(sorted(KERNELS), FORMATS, SHAPES, (torch.bfloat16, torch.float32))
    if name != "reference" and KERNELS[name].supports(LayerKind(parse_scheme(slug), *shape, dtype, CPU))  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("name", "slug", "shape", "dtype"), CASES)
def test_a_kernel_is_the_reference_within_its_dtype(name: str, slug: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    scheme, weight = quantized(slug, shape)
    kind = LayerKind(scheme, *shape, dtype, CPU)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 3, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    for given in (None, bias):
        y = run(KERNELS[name], kind, weight, x, given)
        assert y.dtype == dtype and y.shape == (2, 3, shape[0])
        bound = INPUTS_ROUNDED.get(name, TOLERANCE[dtype])
        assert relative(y, run(KERNELS["reference"], kind, weight, x, given)) < bound


def test_every_kernel_was_tried() -> None:
    """`bnb-4bit-cpu` needs AVX-512 BF16, which not every machine has, the native kernels a library that was built, Triton's a GPU."""
    tried = {name for name, *_ in CASES} | {"reference"}
    assert {name for name in KERNELS.keys() - tried if not name.startswith(("native-", "triton-"))} <= {"bnb-4bit-cpu"}


def test_the_highest_rank_that_supports_a_layer_runs_it() -> None:
    for slug, shape, dtype in product(FORMATS, SHAPES, (torch.bfloat16, torch.float32)):
        kind = LayerKind(parse_scheme(slug), *shape, dtype, CPU)  # type: ignore[arg-type]
        able = [kernel for kernel in KERNELS.values() if kernel.supports(kind)]
        assert select(kind).rank == max(kernel.rank for kernel in able)


def test_a_lesser_kernel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes takes seconds to import, and its kernel does so to say whether it runs here."""
    kind = LayerKind(parse_scheme("nf4"), 64, 256, torch.bfloat16, CPU)
    ranked = sorted((kernel for kernel in KERNELS.values() if kernel.supports(kind)), key=lambda kernel: kernel.rank)
    monkeypatch.setattr(ranked[0], "supports", lambda _: pytest.fail(f"{ranked[0].name} was asked"))
    assert type(select(kind)) is ranked[-1] and len(ranked) > 1


@pytest.mark.parametrize(("name", "slug", "shape", "dtype"), [case for case in CASES if case[1] not in INT8 and case[2] == (64, 256)])
def test_a_token_alone_is_the_same_token_among_others(name: str, slug: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One kernel at every number of tokens. LLM.int8() is left out: an outlier column concerns the whole batch there."""
    scheme, weight = quantized(slug, shape)
    x = torch.randn(40, shape[1], generator=torch.Generator().manual_seed(7)).to(dtype)
    kind = LayerKind(scheme, *shape, dtype, CPU)
    together = run(KERNELS[name], kind, weight, x)
    alone = torch.cat([run(KERNELS[name], kind, weight, token[None]) for token in x])
    assert relative(together, alone) < 1e-3


# Of kernels that run nothing here, a format that they are for.
ELSEWHERE = {"triton-code-book": "nf4", "triton-int8-tokens": "w8a8", "triton-llm-int8": "int8"}


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_no_tokens_give_no_rows(name: str) -> None:
    slug = next((slug for kernel, slug, shape, _ in CASES if kernel == name), None)
    if slug is None:
        slug = ELSEWHERE.get(name, "w3")
    shape, dtype = next(((shape, dtype) for kernel, _, shape, dtype in CASES if kernel == name), ((64, 256), torch.bfloat16))
    scheme, weight = quantized(slug, shape)
    assert run(KERNELS[name], LayerKind(scheme, *shape, dtype, CPU), weight, torch.zeros(0, shape[1], dtype=dtype)).shape == (0, shape[0])


def test_int8_tokens_are_the_reference_to_the_bit() -> None:
    scheme, weight = quantized("w8a8", (64, 256))
    kind = LayerKind(scheme, 64, 256, torch.bfloat16, CPU)
    x = torch.randn(9, 256).bfloat16()
    assert torch.equal(run(KERNELS["torch-int8-tokens-cpu"], kind, weight, x), run(KERNELS["reference"], kind, weight, x))


def test_int8_products_are_exact_at_the_ends_of_the_range() -> None:
    x, w = torch.full((1, 4096), -128, dtype=torch.int8), torch.full((1, 4096), -128, dtype=torch.int8)
    assert exact_int8_product(x, w).item() == 4096 * 128 * 128


@pytest.mark.parametrize(
    ("slug", "dtype", "kernel"),
    [
        ("w4g64", torch.bfloat16, "torch-int4-cpu"),
        ("w4g64", torch.float32, "reference"),
        ("w4", torch.bfloat16, "reference"),
        ("w3g64", torch.bfloat16, "reference"),
        ("w8", torch.bfloat16, "torch-int8-cpu"),
        ("w8a8", torch.float32, "torch-int8-tokens-cpu"),
        ("int8", torch.bfloat16, "bnb-int8-cpu"),
        ("fp8", torch.bfloat16, "reference"),
        ("w4g64a8", torch.bfloat16, "reference"),
        ("nf4", torch.float32, "reference"),
    ],
)
def test_without_the_native_library_torchs_kernels_run_what_they_can(
    slug: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in KERNELS if name.startswith("native-")]:
        monkeypatch.delitem(KERNELS, name)
    assert select(LayerKind(parse_scheme(slug), 64, 256, dtype, CPU)).name == kernel  # type: ignore[arg-type]
