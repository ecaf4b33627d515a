"""Eight bits in groups on a CPU, for large matrices: one of torch's per-channel products for each group of inputs, summed in fp32.

A matrix of many rows, such as the output matrix, is larger than the cache, and the reference would write and read a floating copy of it
for every token. For smaller ones that copy stays in the cache, and one product of many tokens beats many products.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.kernels.base import Kernel, LayerKind
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight, Spec, groups

_LARGE = 8 << 20  # weights; 16 MiB as a bf16 copy, half of a common last-level cache


class Int8GroupsCpu(Kernel):
    name = "torch-int8-groups-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        scheme = layer.scheme
        return (
            isinstance(scheme, IntegerScheme)
            and (scheme.weight_bits, scheme.zero, scheme.activation_bits) == (8, "none", None)
            and scheme.group_size is not None
            and (layer.dtype, layer.device.type) == (torch.bfloat16, "cpu")
            and layer.out_features * layer.in_features >= _LARGE
        )

    def specs(self) -> dict[str, Spec]:
        rows, columns, count = self.layer.out_features, self.layer.in_features, self._groups
        return {"codes": ((count, rows, columns // count), torch.int8), "scale": ((count, rows), torch.bfloat16)}

    @property
    def _groups(self) -> int:
        assert isinstance(self.layer.scheme, IntegerScheme)
        return groups(self.layer.scheme, self.layer.in_features)

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes = weight.tensors["codes"].view(self.layer.out_features, self._groups, -1)
        return {
            # A copy even of a single group: torch's kernel reads a vector past the end, and a mapped file may end there.
            "codes": codes.transpose(0, 1).clone(memory_format=torch.contiguous_format),
            "scale": weight.tensors["scale"].T.to(torch.bfloat16).contiguous(),
        }

    def rows(self, indices: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        values = buffers["codes"][:, indices].float() * buffers["scale"][:, indices].float().unsqueeze(-1)  # [G, n, group]
        return values.transpose(0, 1).reshape(len(indices), self.layer.in_features)

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self._groups, self.layer.in_features // self._groups).transpose(0, 1).contiguous()  # [G, tokens, group]
        y = torch.zeros(tokens.shape[1], self.layer.out_features, dtype=torch.float32)
        for group, codes, scale in zip(tokens, buffers["codes"], buffers["scale"], strict=True):
            y += torch._weight_int8pack_mm(group, codes, scale)
        y = y.view(*x.shape[:-1], self.layer.out_features)
        return (y if bias is None else y + bias).to(x.dtype)
