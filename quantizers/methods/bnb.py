"""The formats of bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), NF4 and FP4 (QLoRA, 2023, arXiv 2305.14314).

Four bits in blocks of 64 with one fp32 absmax each, 4.5 bits a weight; or, with double quantization (QLoRA, section 3), an absmax of 8
bits, 4.127 bits a weight. LLM.int8() takes the columns of the input that hold outliers out of the int8 product while it runs; naive int8 is
the same with a threshold of 0.
"""

import sys
from typing import TYPE_CHECKING, ClassVar, Literal

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.base import LayerGroups, Method
from quantizers.scheme import BnbScheme, LayerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.weights import QuantizedWeight

_LIBRARY_BYTES = 45 << 20  # measured


class Bnb(Method):
    """bitsandbytes."""

    name: Literal["bnb"] = "bnb"
    summary: ClassVar[str] = "LLM.int8() and the 4-bit code books nf4 and fp4 of bitsandbytes; no data, seconds."

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, BnbScheme):
            raise UnsupportedScheme(
                f"bnb makes the formats int8, int8t<threshold>, nf4, fp4, nf4dq and fp4dq, not {scheme.slug}: use rtn for it", param="model"
            )

    def scratch_bytes(self, groups: LayerGroups) -> int:
        """A copy, what bitsandbytes makes of it one after the other, and the library itself where nobody has needed it yet."""
        library = 0 if "bitsandbytes" in sys.modules else _LIBRARY_BYTES
        return super().scratch_bytes(groups) * 7 // 4 + library

    def apply(self, block: "Block") -> None:
        for name, scheme in block.schemes.items():
            assert isinstance(scheme, BnbScheme), "checked by the recipe"
            block.put(name, quantize_bnb(block.linears[name].weight.detach(), scheme, layer=name))


def quantize_bnb(weight: "Tensor", scheme: BnbScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` if it is not finite."""
    import torch

    from quantizers.finite import all_finite
    from quantizers.kernels.bnb import functional
    from quantizers.scheme import BNB_BLOCK
    from quantizers.weights import QuantizedWeight

    if not all_finite(weight):
        raise QuantizationFailed("its weights hold NaN or infinity: the checkpoint is damaged", layer=layer)
    values = weight.to(torch.float32, copy=True).contiguous()
    if scheme.format == "int8":
        # On the CPU, wherever the weight is: bitsandbytes' CUDA function takes fp16 alone, which would round the weight first.
        codes, absmax, _ = functional().int8_vectorwise_quant(values.cpu())
        codes[absmax == 0] = 0  # bitsandbytes divides zero by zero there, and casts the NaN to an integer
        tensors = {"codes": codes.to(weight.device), "absmax": absmax.to(weight.device)}
    else:
        packed, state = functional().quantize_4bit(
            values, blocksize=BNB_BLOCK, quant_type=scheme.format, compress_statistics=scheme.double_quant
        )
        tensors = {"codes": packed.view(-1), "absmax": state.absmax}
        if scheme.double_quant:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.view(1)}
    return QuantizedWeight(scheme, weight.shape[0], weight.shape[1], tensors)
