"""Our own CPU kernel of fp8: e4m3 tokens and weights, multiplied as the bf16 numbers that they are, summed in fp32.

Products of two numbers of e4m3 are exact in fp32 and their sums are rounded there, so a result is the reference's within fp32's rounding.
It is the same to the bit at any batch size, thread count and instruction set.
"""

import torch
from torch import Tensor

from quantizers.kernels.base import LayerKind
from quantizers.kernels.cpu import library
from quantizers.kernels.native import Form, NativeWeightOnly, has_native_shape
from quantizers.scheme import MinifloatScheme
from quantizers.weights import QuantizedWeight


class NativeE4m3(NativeWeightOnly):
    name = "native-cpu-fp8"
    kind = library.E4M3

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return isinstance(layer.scheme, MinifloatScheme) and layer.scheme.format == "fp8" and has_native_shape(layer)

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes, scale = weight.tensors["codes"].reshape(-1), weight.tensors["scale"].reshape(-1).contiguous().view(torch.uint8)
        packed = library.aligned_bytes(library.packed_bytes(self.matrix(0, None)))
        packed[: len(codes)] = codes
        packed[len(codes) : -len(scale)] = 0
        packed[-len(scale) :] = scale
        return {"packed": packed}

    def form(self) -> Form:
        return Form(self.kind, 8, self.layer.in_features)
