"""Four-bit groups on a CPU through torch's own `_weight_int4pack_mm_for_cpu`: w = (code - 8) * scale + zero, in bf16.

Every zero of `IntegerScheme` is of that form: 0, (8 - zero_point) * scale, or minimum + 8 * scale. Scales and zeros are rounded to bf16,
as torch's kernel wants them: a relative error of 2^-9 a group, the size of the rounding that a bf16 weight has.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.kernels.base import Kernel, LayerKind
from quantizers.packing import unpack
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight, Spec

_ROWS = 16  # torch packs rows by sixteens
_MIDDLE = 8


class Int4Cpu(Kernel):
    name = "torch-int4-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        # In fp32 and fp16 torch's kernel is a scalar loop, slower than dequantizing.
        scheme = layer.scheme
        return (
            isinstance(scheme, IntegerScheme)
            and (scheme.weight_bits, scheme.activation_bits) == (4, None)
            and scheme.group_size is not None
            and (layer.dtype, layer.device.type) == (torch.bfloat16, "cpu")
            and layer.out_features % _ROWS == 0
        )

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {
            "packed": ((rows, columns // 2), torch.uint8),
            "scales_and_zeros": ((columns // self._group, rows, 2), torch.bfloat16),
        }

    @property
    def _group(self) -> int:
        assert isinstance(self.layer.scheme, IntegerScheme) and self.layer.scheme.group_size is not None
        return self.layer.scheme.group_size

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = weight.tensors
        scale = tensors["scale"].float()  # [out, G]
        if "zero_point" in tensors:
            zero = (_MIDDLE - tensors["zero_point"].float()) * scale
        elif "minimum" in tensors:
            zero = tensors["minimum"].float() + _MIDDLE * scale
        else:
            zero = torch.zeros_like(scale)
        codes = unpack(tensors["codes"], 4, self.layer.in_features).int()
        return {
            "packed": torch._convert_weight_to_int4pack_for_cpu(codes, 1),
            "scales_and_zeros": torch.stack((scale, zero), -1).transpose(0, 1).to(torch.bfloat16).contiguous(),
        }

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self.layer.in_features)
        y = torch._weight_int4pack_mm_for_cpu(tokens, buffers["packed"], self._group, buffers["scales_and_zeros"])
        y = y.view(*x.shape[:-1], self.layer.out_features)
        return y if bias is None else y + bias
