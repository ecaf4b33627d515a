"""Our Triton products of int8 tokens and int8 weights behind the registry: `w8a8`, and LLM.int8() with its outlier columns."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.kernels import cuda
from quantizers.kernels.base import Kernel, LayerKind
from quantizers.scheme import BnbScheme, IntegerScheme
from quantizers.weights import QuantizedWeight, Spec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonInt8Tokens(Kernel):
    """8 bits a channel with 8 bits a token: exact integer sums, so the reference's results at any number of tokens.

    `codes` int8 [rows, columns] as in the weight, `scale` fp32 [rows].
    """

    name = "triton-int8-tokens"
    rank = 20

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        scheme = layer.scheme
        channels = isinstance(scheme, IntegerScheme) and (scheme.weight_bits, scheme.group_size, scheme.zero) == (8, None, "none")
        return channels and getattr(scheme, "activation_bits", None) == 8 and _runs(layer)

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {"codes": ((rows, columns), torch.int8), "scale": ((rows,), torch.float32)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": weight.tensors["codes"].contiguous(), "scale": weight.tensors["scale"].view(-1).float()}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.layer.out_features)
        from quantizers.kernels.cuda import int8

        tokens = x.reshape(-1, self.layer.in_features).contiguous()
        y: Tensor = int8.product(tokens, buffers["codes"], buffers["scale"], bias, self._threshold)
        return y.view(*x.shape[:-1], self.layer.out_features)

    @property
    def _threshold(self) -> float | None:
        return None


class TritonLlmInt8(TritonInt8Tokens):
    """LLM.int8(): the same, and columns that hold an outlier in floating point. `scale` is the weight's absmax / 127.

    An outlier in one token takes its column out of int8 for all the tokens that are computed with it: results depend on the batch.
    """

    name = "triton-llm-int8"

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return isinstance(layer.scheme, BnbScheme) and layer.scheme.format == "int8" and _runs(layer)

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": weight.tensors["codes"].contiguous(), "scale": weight.tensors["absmax"] / 127}

    @property
    def _threshold(self) -> float | None:
        assert isinstance(self.layer.scheme, BnbScheme)
        return self.layer.scheme.outlier_threshold


def _runs(layer: LayerKind) -> bool:
    return layer.dtype in _DTYPES and layer.out_features > 0 and layer.in_features > 0 and cuda.why_not(layer.device) is None
