"""bitsandbytes' own products on a CPU, and the one place where the library is imported, when first needed (it takes two seconds)."""

import logging
from collections.abc import Mapping
from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from quantizers.kernels.base import Kernel, LayerKind
from quantizers.scheme import BNB_BLOCK, BnbScheme
from quantizers.weights import QuantizedWeight, Spec, block_absmax, table

_PACKED_ROWS = 32  # bitsandbytes' CPU layout interleaves rows by thirty-two


@cache
def functional() -> ModuleType:
    """`bitsandbytes.functional`, with its operators registered."""
    # It warns that it could not fetch a faster kernel from a hub, which a server that fetches no code must not do anyway.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional  # type: ignore[no-any-return]


def _is_bnb(layer: LayerKind, *formats: str) -> bool:
    return isinstance(layer.scheme, BnbScheme) and layer.scheme.format in formats and layer.device.type == "cpu"


class Bnb4BitCpu(Kernel):
    """NF4 and FP4 through the fused AVX-512 kernel (bf16, absmax rounded to bf16), for every number of tokens."""

    name = "bnb-4bit-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return (
            _is_bnb(layer, "nf4", "fp4")
            and layer.dtype == torch.bfloat16
            and layer.out_features % _PACKED_ROWS == 0
            and layer.in_features % BNB_BLOCK == 0
            and bool(functional().has_avx512bf16())
        )

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {"packed": ((rows, columns // 2), torch.uint8), "absmax": ((columns // BNB_BLOCK, rows), torch.bfloat16)}

    @property
    def _scheme(self) -> BnbScheme:
        assert isinstance(self.layer.scheme, BnbScheme)
        return self.layer.scheme

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        state = SimpleNamespace(
            shape=(self.layer.out_features, self.layer.in_features),
            blocksize=BNB_BLOCK,
            absmax=block_absmax(self._scheme, weight.tensors),
            dtype=torch.bfloat16,
            nested=False,
        )
        packed, state = functional()._convert_weight_packed_for_cpu(weight.tensors["codes"], state)
        return {"packed": packed, "absmax": state.absmax}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        codebook = table(self._scheme.format, x.device)  # bitsandbytes tells the formats apart by its second entry
        shape = (self.layer.out_features, self.layer.in_features)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.layer.out_features)
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x.contiguous(), buffers["packed"], shape, buffers["absmax"], codebook, BNB_BLOCK)
        return y if bias is None else y + bias


class BnbInt8Cpu(Kernel):
    """LLM.int8() through bitsandbytes' operators, in fp32 outside the int8 product.

    bitsandbytes' own layer would cast bf16 inputs to fp16, which overflows at 65504 (and on a CPU would leave the tokens in floating
    point); its operators take fp32 and do what the layer does on a GPU. An outlier in one token
    takes its column out of int8 for all the tokens that are computed with it: that is the algorithm, so results depend on the batch.
    """

    name = "bnb-int8-cpu"
    rank = 10

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _is_bnb(layer, "int8") and layer.in_features > 1  # torch's int8 product, underneath, makes wrong sums of one input

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return {"codes": ((rows, columns), torch.int8), "absmax": ((rows,), torch.float32)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        functional()
        # Copies: torch's int8 product reads a vector past the end, and behind a mapped file's last page there is nothing.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weight.tensors.items()}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        assert isinstance(self.layer.scheme, BnbScheme)
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.layer.out_features)
        # A copy even of fp32: bitsandbytes blanks the outliers of its input while it works.
        tokens = x.reshape(-1, self.layer.in_features).to(torch.float32, copy=True)
        ops = torch.ops.bitsandbytes
        codes, absmax, columns = ops.int8_vectorwise_quant(tokens, self.layer.scheme.outlier_threshold)
        offset = None if bias is None else bias.float()
        y, _ = ops.int8_mixed_scaled_mm(tokens, codes, buffers["codes"], absmax, buffers["absmax"], columns, offset)
        return y.view(*x.shape[:-1], self.layer.out_features).to(x.dtype)  # type: ignore[no-any-return]
