"""Eight bits a channel on a CPU through torch's own products: `_weight_int8pack_mm` in bf16, `_int_mm` where the tokens are int8 too."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.activations import quantize_tokens
from quantizers.kernels.base import Kernel, LayerKind
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight, Spec


def _is_channel_int8(layer: LayerKind) -> bool:
    scheme = layer.scheme
    symmetric_channels = isinstance(scheme, IntegerScheme) and (scheme.weight_bits, scheme.group_size, scheme.zero) == (8, None, "none")
    return symmetric_channels and layer.device.type == "cpu" and layer.in_features > 1  # of one input `_int_mm` makes wrong sums


def _owned(codes: Tensor) -> Tensor:
    """A copy in torch's own memory: its kernels read a vector past the end, and behind a mapped file's last page there is nothing."""
    return codes.clone(memory_format=torch.contiguous_format)


class Int8WeightCpu(Kernel):
    """Weight-only; the scales are rounded to bf16, as torch's kernel wants them. In fp32 and fp16 that kernel is a scalar loop."""

    name = "torch-int8-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _is_channel_int8(layer) and getattr(layer.scheme, "activation_bits", None) is None and layer.dtype == torch.bfloat16

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {"codes": ((rows, columns), torch.int8), "scale": ((rows,), torch.bfloat16)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": _owned(weight.tensors["codes"]), "scale": weight.tensors["scale"].view(-1).to(torch.bfloat16)}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self.layer.in_features)
        y = torch._weight_int8pack_mm(tokens, buffers["codes"], buffers["scale"]).view(*x.shape[:-1], self.layer.out_features)
        return y if bias is None else y + bias


class Int8TokensCpu(Kernel):
    """Int8 tokens and int8 weights, summed in int32: exact, so the result is the reference's to the bit, at any batch size."""

    name = "torch-int8-tokens-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _is_channel_int8(layer) and getattr(layer.scheme, "activation_bits", None) == 8

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {"codes": ((rows, columns), torch.int8), "scale": ((rows,), torch.float32)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": _owned(weight.tensors["codes"]), "scale": weight.tensors["scale"].view(-1).float()}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        codes, scale = quantize_tokens(x.reshape(-1, self.layer.in_features))
        y = torch._int_mm(codes, buffers["codes"].T).float() * scale * buffers["scale"]
        y = y.view(*x.shape[:-1], self.layer.out_features)
        return (y if bias is None else y + bias).to(x.dtype)
