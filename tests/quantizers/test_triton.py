"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for the devices they are meant for; and how their codes lie."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_weights import random_weight

from quantizers.kernels import KERNELS, LayerKind, cuda, select
from quantizers.kernels.cuda import layout
from quantizers.scheme import parse_scheme
from quantizers.weights import NF4_TABLE
from server.engine.scheduler import Limits

ROOT = Path(__file__).parents[2]
has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it has no wheel for this platform, or the environment is not dev",
)


def interprets() -> bool:
    return importlib.util.find_spec("triton") is not None and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)


@has_triton
@pytest.mark.skipif(not interprets(), reason="before 3.7 Triton's interpreter asks numpy for a conversion that numpy 2.4 took away")
def test_the_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / "tests/quantizers/interpreted")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@given(rows=st.integers(1, 4), columns=st.integers(1, 300), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 99))
def test_a_code_lies_where_it_is_drawn(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    laid = layout.interleave(codes, bits)
    width, span = min(bits, 2 if bits == 3 else 8), layout.span_inputs(bits)
    assert laid.keys() == ({"low", "high"} if bits == 3 else {"low"})
    assert laid["low"].shape == (layout.spans(columns, bits), rows, 32)
    row = rows - 1
    for column in range(columns):
        where, inside = divmod(column, span)
        plane, byte = divmod(inside, 32)
        code = int(laid["low"][where, row, byte]) >> (plane * width) & ((1 << width) - 1)
        if bits == 3:
            code |= (int(laid["high"][where, row, byte % 16]) >> (plane + 4 * (byte // 16)) & 1) << 2
        assert code == codes[row, column]


def test_without_a_cuda_device_they_say_why_and_are_not_chosen() -> None:
    assert "need a CUDA device" in str(cuda.why_not(torch.device("cpu")))
    for slug in ("w4g64", "w8", "nf4", "w8a8"):
        scheme = parse_scheme(slug)
        kind = LayerKind(scheme, 128, 128, torch.bfloat16, torch.device("cpu"))  # type: ignore[arg-type]
        assert not any(kernel.supports(kind) for name, kernel in KERNELS.items() if name.startswith("triton-"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slug", ["w2g64", "w3g64z", "w4g32m", "w4g128", "w8g32", "w8", "nf4", "fp4", "w8a8", "int8"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 300])
def test_a_gpu_computes_what_the_reference_does(slug: str, tokens: int) -> None:
    device = torch.device("cuda")
    scheme = parse_scheme(slug)
    kind = LayerKind(scheme, 1030, 1536, torch.bfloat16, device)  # type: ignore[arg-type]
    kernel, weight = select(kind), random_weight(scheme, 1030, 1536).to(device)  # type: ignore[arg-type]
    assert kernel.name.startswith("triton-")
    x = torch.randn(tokens, 1536, device=device, dtype=torch.bfloat16)
    y, expected = kernel.run(x, kernel.prepare(weight), None), KERNELS["reference"](kind).run(x, weight.tensors, None)
    assert ((y - expected).norm() / expected.norm()).item() < 4e-3  # two roundings of the result to bf16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slug", ["w2g64", "w3g64z", "w4g32m", "w4g64", "w8g32", "w8", "nf4", "w8a8"])
def test_on_a_gpu_a_row_is_the_same_in_any_batch_of_decoding(slug: str) -> None:
    device = torch.device("cuda")
    scheme = parse_scheme(slug)
    kernel = select(LayerKind(scheme, 1030, 1536, torch.bfloat16, device))  # type: ignore[arg-type]
    buffers = kernel.prepare(random_weight(scheme, 1030, 1536).to(device))  # type: ignore[arg-type]
    x = torch.randn(Limits.sequences, 1536, device=device, dtype=torch.bfloat16)
    whole = kernel.run(x, buffers, None)
    for tokens in range(1, Limits.sequences):
        assert torch.equal(kernel.run(x[:tokens], buffers, None), whole[:tokens]), tokens


def compiled(kernel: Any, capability: int, arguments: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    """PTX and cubin of `kernel` for a device that need not be there; pointers and sizes as multiples of 16, as in a real model."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = [index for index, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name != "tokens"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    result: dict[str, Any] = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    ).asm
    return result


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


SOME = [(2, 0, 64), (3, 1, 64), (4, 0, 128), (4, 2, 32), (8, 0, 0), (4, 3, 64)]


@has_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(("form", "capability"), [*product(SOME, (90,)), ((4, 0, 128), 80)])
def test_products_compile(form: tuple[int, int, int], capability: int) -> None:
    import triton.language as tl

    from quantizers.kernels.cuda import numbers, weight_only

    bits, zero, group = form
    kinds = {layout.POINT: "*u8", layout.MINIMUM: "*fp16"}
    for tokens, split, operand in ((1, True, tl.bfloat16), (512, False, tl.float16)):
        tile = weight_only.plan(tokens, 4096, 64).tile
        inputs = "*bf16" if operand == tl.bfloat16 else "*fp16"
        constants = {"BITS": bits, "ZERO": zero, "GROUP": group, "SEGMENTS": 4 if split else 1, "OPERAND": operand}
        dtype = torch.bfloat16 if operand == tl.bfloat16 else torch.float16
        ptx = numbers.book(NF4_TABLE, dtype) if zero == layout.TABLE else numbers.integers(bits, dtype)
        constants |= {"ROWS": tile.rows, "TOKENS": tile.tokens, "NUMBERS": ptx, "BASE": numbers.base(bits, dtype)}
        constants |= dict.fromkeys([*(["high"] if bits != 3 else []), *([] if zero in kinds else ["zero"]), *(["bias"] if split else [])])
        arguments = {"x": inputs, "low": "*u8", "high": "*u8", "scale": "*fp32" if zero == layout.TABLE else "*fp16"}
        arguments |= {"zero": kinds.get(zero, ""), "bias": inputs, "y": "*fp32" if split else inputs}
        arguments |= dict.fromkeys(("tokens", "rows", "columns", "spans", "groups"), "i32")
        code = compiled(weight_only.product_kernel, capability, arguments, constants, tile.warps, tile.stages)
        assert ("wgmma" if capability >= 90 and tile.warps >= 4 else "mma.sync") in code["ptx"], "products run on the tensor cores"
        assert len(code["cubin"]) > 0


@has_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(("outliers", "capability"), [(False, 80), (False, 90), (True, 90)])
def test_int8_products_compile(outliers: bool, capability: int) -> None:
    import triton.language as tl

    from quantizers.kernels.cuda import int8, weight_only

    pointers = {
        "codes": "*i8",
        "token_scale": "*fp32",
        "x": "*bf16",
        "outlier": "*u8",
        "weight": "*i8",
        "row_scale": "*fp32",
        "bias": "*bf16",
    }
    for tokens, split in ((1, True), (512, False)):
        tile = weight_only.plan(tokens, 4096, 64).tile
        constants: dict[str, Any] = {
            "SEGMENTS": 4 if split else 1,
            "OPERAND": tl.bfloat16,
            "ROWS": tile.rows,
            "TOKENS": tile.tokens,
            "DEPTH": 128,
        }
        absent = [*([] if outliers else ["outlier"]), *(["bias"] if split else []), *([] if split and outliers else ["beside"])]
        arguments = {
            **pointers,
            "y": "*i32" if split else "*bf16",
            "beside": "*fp32",
            **dict.fromkeys(("tokens", "rows", "columns"), "i32"),
        }
        code = compiled(int8.product_kernel, capability, arguments, constants | dict.fromkeys(absent), tile.warps, tile.stages)
        assert (".s32.s8.s8" if capability >= 90 and tile.warps >= 4 else "s32.s8.s8.s32") in code["ptx"], (
            "integer products run on the tensor cores"
        )
    arguments = {**pointers, "scale": "*fp32", "columns": "i32"}
    constants = {"LLM": outliers, "BLOCK": 1024, **({} if outliers else {"outlier": None})}
    assert len(compiled(int8.quantize_kernel, capability, arguments, constants, 4, 1)["cubin"]) > 0


@has_triton
@pytest.mark.usefixtures("fresh_cache")
def test_sums_of_segments_compile() -> None:
    from quantizers.kernels.cuda import int8, weight_only

    sizes = {"elements": "i32", "rows": "i32"}
    constants = {"SEGMENTS": 4, "BLOCK": 1024}
    arguments = {"partial": "*fp32", "bias": "*bf16", "y": "*bf16", **sizes}
    assert len(compiled(weight_only.sum_kernel, 90, arguments, constants, 4, 1)["cubin"]) > 0
    arguments |= {"partial": "*i32", "beside": "*fp32", "token_scale": "*fp32", "row_scale": "*fp32"}
    assert len(compiled(int8.sum_kernel, 90, arguments, constants, 4, 1)["cubin"]) > 0


@has_triton
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("in_bytes", [False, True])
def test_attention_compiles(in_bytes: bool, width: int, capability: int) -> None:
    import triton.language as tl

    from quantizers.kernels.cuda import paged_decode

    arguments = dict.fromkeys(("query", "keys", "values", "output"), "*bf16") | dict.fromkeys(("sums", "peaks", "masses"), "*fp32")
    arguments |= {"tables": "*i32", "positions": "*i64", "scale": "fp32", "softcap": "fp32"}
    arguments |= dict.fromkeys(("heads", "width", "pieces", "window"), "i32")
    constants: dict[str, Any] = {"VALUE_DIM": width, "PIECE": 256, "WINDOWED": True, "VALUE_PART": width}
    assert len(compiled(paged_decode.join_kernel, capability, arguments, constants, 4, 1)["cubin"]) > 0
    constants |= {"KV_HEADS": 8, "SHARED": 4, "KEY_DIM": width, "BLOCK": 16, "CAPPED": True, "OPERAND": tl.bfloat16}
    constants |= {"HEADS": 16, "KEY_PART": width, "STEP": 64}
    cached = {"keys": "*i8", "values": "*i8"} if in_bytes else {}
    arguments |= {"key_scales": "*fp32", "value_scales": "*fp32", **cached}
    code = compiled(paged_decode.attend_kernel, capability, arguments, {**constants, "SCALED": in_bytes}, 4, 2)
    assert "mma" in code["ptx"], "products run on the tensor cores"
