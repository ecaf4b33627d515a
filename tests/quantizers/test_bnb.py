"""The formats of bitsandbytes against its own dequantization and its own layers."""

import bitsandbytes
import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt

from quantizers.errors import QuantizationFailed
from quantizers.kernels.base import LayerKind
from quantizers.kernels.bnb import BnbInt8Cpu
from quantizers.kernels.reference import Reference
from quantizers.methods.bnb import quantize_bnb
from quantizers.scheme import BnbScheme
from quantizers.weights import BNB_BLOCK, FP4_TABLE, NF4_TABLE

SHAPES = [(64, 128), (5, 64), (3, 37), (7, 100)]  # whole blocks; blocks that run across rows; odd numbers of weights


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[1] = 0
    return weight


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_tables_are_bitsandbytes(format_: str) -> None:
    theirs = bitsandbytes.functional.get_4bit_type(format_, device="cpu")
    assert torch.equal(torch.tensor(NF4_TABLE if format_ == "nf4" else FP4_TABLE), theirs)


@pytest.mark.parametrize("format_", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_dequantize_as_bitsandbytes_does(format_: str, shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    ours = quantize_bnb(weight, BnbScheme(format=format_), layer="layer")
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=BNB_BLOCK, quant_type=format_)
    assert torch.equal(ours.dequantize(), bitsandbytes.functional.dequantize_4bit(packed, state))
    assert ours.bytes == packed.nbytes + state.absmax.nbytes == -(-weight.numel() // 2) + 4 * -(-weight.numel() // 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_dequantizes_as_bitsandbytes_does(shape: tuple[int, int]) -> None:
    ours = quantize_bnb(weight_of(shape), BnbScheme(format="int8"), layer="layer")
    theirs = bitsandbytes.functional.int8_vectorwise_dequant(ours.tensors["codes"], ours.tensors["absmax"])
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=0)  # bitsandbytes multiplies by a rounded 1/127
    assert not ours.tensors["codes"][1].any() and bool(torch.isfinite(ours.dequantize()).all())


def test_quantizing_leaves_its_input_alone() -> None:
    weight = weight_of((64, 128))
    before = weight.clone()
    for format_ in ("int8", "nf4", "fp4"):
        quantize_bnb(weight, BnbScheme(format=format_), layer="layer")
    assert torch.equal(weight, before)


@pytest.mark.parametrize("format_", ["int8", "nf4", "fp4"])
def test_weights_that_are_not_finite_fail_with_the_layers_name(format_: str) -> None:
    weight = weight_of((64, 128))
    weight[0, 0] = float("nan")
    with pytest.raises(QuantizationFailed, match=r"^proj: .*NaN"):
        quantize_bnb(weight, BnbScheme(format=format_), layer="proj")


@pytest.mark.parametrize("kernel", [BnbInt8Cpu, Reference])
@pytest.mark.parametrize("outlier", [0.0, 20.0])
def test_int8_is_bitsandbytes_own_product(kernel: type[BnbInt8Cpu | Reference], outlier: float) -> None:
    """It casts both sides to fp16; of numbers that fp16 holds, its result and ours differ by the rounding of its output only."""
    weight, x = weight_of((64, 128)).half().float(), torch.randn(9, 128, generator=torch.Generator().manual_seed(4)).half().float()
    x[2, 17] += outlier
    state = bitsandbytes.MatmulLtState()
    state.threshold, state.has_fp16_weights = 6.0, False
    theirs = MatMul8bitLt.apply(x.half(), weight, None, None, state).float()  # what `bitsandbytes.matmul` runs on a GPU
    scheme = BnbScheme(format="int8")
    ours = kernel(LayerKind(scheme, 64, 128, torch.float32, torch.device("cpu")))
    y = ours.run(x, ours.prepare(quantize_bnb(weight, scheme, layer="layer")), None)
    assert (y - theirs).norm() / theirs.norm() < 5e-4
    assert (y - x @ weight.T).norm() / (x @ weight.T).norm() < 0.02


def test_int8_takes_inputs_beyond_fp16() -> None:
    """A cast to fp16, as bitsandbytes' layer makes of bf16, would give infinity here."""
    weight, x = weight_of((64, 128)), torch.ones(2, 128, dtype=torch.bfloat16)
    x[0, 5] = 1e6
    scheme = BnbScheme(format="int8")
    kernel = BnbInt8Cpu(LayerKind(scheme, 64, 128, torch.bfloat16, torch.device("cpu")))
    y = kernel.run(x, kernel.prepare(quantize_bnb(weight, scheme, layer="layer")), None)
    assert bool(torch.isfinite(y).all()) and y.dtype == torch.bfloat16
