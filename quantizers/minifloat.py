"""Floats of 8 and 4 bits and the scales that they come with: numbers to bit patterns and back, and whole weights.

The most significant bit first; s is the sign, e the exponent, m the fraction:

    e4m3   s eeee mmm     (-1)^s 2^(e - 7) (1 + m / 8); e = 0: 2^-6 m / 8; s1111111 is NaN, there is no infinity; up to 448
    e2m1   s ee m         the code's lower three bits count 0, 0.5, 1, 1.5, 2, 3, 4, 6
    e8m0   eeeeeeee       2^(e - 127), no sign, no zero; 11111111 is NaN
    byte of two e2m1      hhhh llll: input 2i in the low four bits, input 2i + 1 in the high ones

e4m3 is that of OCP FP8, which has no infinities; e2m1 and e8m0 are those of OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1.
All rounding is to the nearest, ties to even, and saturates. The tensors of a weight are named in `quantizers.weights`.
"""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from quantizers.packing import AT_ONCE, looked_up, pack_rows, unpack
from quantizers.scheme import MXFP4_BLOCK, NVFP4_BLOCK

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0
_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(E2M1))
_BIAS = 127  # of e8m0
_E2M1_EXPONENT = 2  # of its largest power of two, 4
_NAN = 0x7F  # of e4m3, whatever the sign
# A matrix whose largest weight is below it would need a scale beyond fp32; its weights count as this small.
_SMALLEST = 2.0**-100


def e4m3_codes(values: Tensor) -> Tensor:
    """fp32, finite -> uint8 of that shape."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_values(codes: Tensor) -> Tensor:
    """uint8 -> fp32 of that shape, exact."""
    return codes.view(torch.float8_e4m3fn).float()


def e2m1_codes(values: Tensor) -> Tensor:
    """fp32, finite -> uint8 0 to 15 of that shape."""
    magnitude = values.abs()
    codes = (values < 0).to(torch.uint8) << 3
    for lower, middle in enumerate(_MIDDLES):
        # In the middle between two numbers the one with the even code is meant.
        codes += magnitude > middle if lower % 2 == 0 else magnitude >= middle
    return codes


def e2m1_values(codes: Tensor) -> Tensor:
    """uint8 0 to 15 -> fp32 of that shape."""
    return looked_up(e2m1_table(codes.device), codes)


@cache
def e2m1_table(device: torch.device) -> Tensor:
    """fp32 [16]: what each code stands for."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)


def e8m0_codes(largest: Tensor) -> Tensor:
    """uint8: the shared exponent of blocks whose largest magnitude is `largest`, fp32, finite.

    floor(log2(largest)) - 2, as in section 6.3 of the specification; and one more where the largest would be rounded beyond 6, that is from
    7/4 of a power of two on, as compressed-tensors does it.
    """
    fraction, exponent = torch.frexp(largest)  # fraction in [1/2, 1)
    shared = exponent - 1 + (fraction >= 7 / 8).int() - _E2M1_EXPONENT
    return torch.where(largest > 0, shared + _BIAS, _BIAS).clamp(0, 2 * _BIAS).to(torch.uint8)


def e8m0_values(codes: Tensor) -> Tensor:
    """uint8, no NaN -> fp32 of that shape, exact."""
    bits = codes.int() << 23  # where fp32 has its exponent, with the same bias
    return torch.where(codes == 0, 1 << 22, bits).view(torch.float32)  # 2^-127 is subnormal there


def encode(weight: Tensor, format_: str) -> dict[str, Tensor]:
    """The tensors of `weight` fp32 [out, in], finite, in `fp8`, `mxfp4` or `nvfp4`; blocks fit into rows."""
    if format_ == "fp8":
        scale = _nonzero(weight.abs().amax(-1, keepdim=True) / E4M3_MAX)
        return {"codes": e4m3_codes(weight / scale), "scale": scale}
    size = MXFP4_BLOCK if format_ == "mxfp4" else NVFP4_BLOCK
    blocks = weight.view(len(weight), -1, size)
    largest = blocks.abs().amax(-1)
    if format_ == "mxfp4":
        scale, extra = e8m0_codes(largest), {}
        steps = e8m0_values(scale)
    else:
        extra = {"global_scale": (E4M3_MAX * E2M1_MAX / largest.amax().clamp(min=_SMALLEST)).view(1)}
        # A block far below the others keeps the smallest scale instead of none.
        scale = e4m3_codes(largest / E2M1_MAX * extra["global_scale"]).clamp(min=1)
        steps = e4m3_values(scale) / extra["global_scale"]
    rows = max(1, AT_ONCE // weight.shape[1])
    pieces = zip(torch.split(blocks, rows), torch.split(steps.unsqueeze(-1), rows), strict=True)
    return {"codes": pack_rows((e2m1_codes(part / step).flatten(1) for part, step in pieces), 4), "scale": scale} | extra


def decode(format_: str, out_features: int, in_features: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 [out_features, in_features]: the weights that `tensors` stand for."""
    codes, scale = tensors["codes"], tensors["scale"]
    if format_ == "fp8":
        return e4m3_values(codes).mul_(scale)
    steps = e8m0_values(scale) if format_ == "mxfp4" else e4m3_values(scale) / tensors["global_scale"]
    values = e2m1_values(unpack(codes, 4, in_features)).view(out_features, steps.shape[1], -1)
    return values.mul_(steps.unsqueeze(-1)).view(out_features, in_features)


def holds_nan(format_: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a bit pattern that means NaN is among the stored ones."""
    if format_ == "mxfp4":
        return bool((tensors["scale"] == 0xFF).any())
    bits = tensors["codes" if format_ == "fp8" else "scale"]
    return bool(((bits & _NAN) == _NAN).any())


def quantize_tokens_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [tokens, in_features] -> e4m3 numbers as fp32 of that shape, and fp32 [tokens, 1]: x ~ numbers * scale."""
    values = x.float()
    scale = _nonzero(values.abs().amax(-1, keepdim=True) / E4M3_MAX)
    return e4m3_values(e4m3_codes(values / scale)), scale


def _nonzero(scale: Tensor) -> Tensor:
    """Where there is nothing to scale, any scale will do but zero; a subnormal one would lose the quotient."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones(()), scale)
