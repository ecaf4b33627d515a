"""The definition of every format, in plain torch on any device; the other kernels are tested against it.

Weight-only formats: the weight is dequantized in fp32, rounded to the input's dtype, and multiplied as torch multiplies. `a8`: int8
codes of the tokens and codes of the weight are multiplied exactly, in fp64; what scales a whole row or token is applied in fp32.
LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339, section 3.2): columns of the input that hold a magnitude of at least the
threshold are multiplied in floating point, the others in int8. fp8: tokens rounded to e4m3 and the weight's e4m3 numbers are multiplied
exactly, in fp64, and scaled in fp32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantizers.activations import quantize_tokens
from quantizers.kernels.base import Kernel, LayerKind
from quantizers.minifloat import e4m3_values, quantize_tokens_e4m3
from quantizers.scheme import BnbScheme, IntegerScheme, MinifloatScheme
from quantizers.weights import QuantizedWeight, Spec, dequantize, integer_values, is_plain_int8, tensor_specs


class Reference(Kernel):
    name = "reference"
    rank = 0

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:  # noqa: ARG003
        return True

    def specs(self) -> dict[str, Spec]:
        return tensor_specs(self.layer.scheme, self.layer.out_features, self.layer.in_features)

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return dict(weight.tensors)

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self.layer.in_features)
        if isinstance(self.layer.scheme, BnbScheme):
            y = (
                self._llm_int8(tokens, buffers, self.layer.scheme)
                if self.layer.scheme.format == "int8"
                else self._dequantized(tokens, buffers)
            )
        elif isinstance(self.layer.scheme, MinifloatScheme):
            y = self._e4m3_tokens(tokens, buffers) if self.layer.scheme.format == "fp8" else self._dequantized(tokens, buffers)
        elif self.layer.scheme.activation_bits:
            y = self._int8_tokens(tokens, buffers)
        else:
            y = self._dequantized(tokens, buffers)
        y = y.view(*x.shape[:-1], self.layer.out_features)
        return (y if bias is None else y + bias).to(x.dtype)

    def rows(self, indices: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        assert not isinstance(self.layer.scheme, BnbScheme), "blocks of bitsandbytes run across rows"
        chosen = {name: buffer if name == "global_scale" else buffer[indices] for name, buffer in buffers.items()}
        return dequantize(self.layer.scheme, len(indices), self.layer.in_features, chosen)

    def _dequantized(self, tokens: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        weight = dequantize(self.layer.scheme, self.layer.out_features, self.layer.in_features, buffers)
        return linear(tokens, weight.to(tokens.dtype))

    def _int8_tokens(self, tokens: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(self.layer.scheme, IntegerScheme)
        codes, scale = quantize_tokens(tokens)
        if not is_plain_int8(self.layer.scheme) or self.layer.scheme.group_size is not None:
            weight = integer_values(self.layer.scheme, self.layer.out_features, self.layer.in_features, buffers, torch.float64)
            return (codes.double() @ weight.T).float() * scale
        return exact_int8_product(codes, buffers["codes"]) * scale * buffers["scale"].float().view(1, -1)

    def _e4m3_tokens(self, tokens: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        numbers, scale = quantize_tokens_e4m3(tokens)
        return (numbers.double() @ e4m3_values(buffers["codes"]).double().T).float() * scale * buffers["scale"].view(1, -1)

    def _llm_int8(self, tokens: Tensor, buffers: Mapping[str, Tensor], scheme: BnbScheme) -> Tensor:
        values, codes, absmax = tokens.float(), buffers["codes"], buffers["absmax"]
        outlier = (
            (values.abs() >= scheme.outlier_threshold).any(0)
            if scheme.outlier_threshold > 0
            else torch.zeros_like(values[0], dtype=torch.bool)
        )
        inner = values.masked_fill(outlier, 0)
        row_max = inner.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        product = exact_int8_product((inner * (127 / row_max)).round().to(torch.int8), codes)
        y = product * (row_max / 127) * (absmax / 127)
        return y + values[:, outlier] @ (codes[:, outlier].float() * (absmax / 127).unsqueeze(-1)).T


def exact_int8_product(x: Tensor, w: Tensor) -> Tensor:
    """int8 [tokens, in] and [out, in] -> fp32 [tokens, out]: exact sums, since fp64 holds any of up to 2^39 products."""
    return (x.double() @ w.double().T).float()
