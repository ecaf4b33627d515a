"""The formats of bitsandbytes: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), NF4 and FP4 (QLoRA, 2023, arXiv 2305.14314).

Blocks of 64 with one fp32 absmax each, no double quantization: 4.5 bits a weight.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.base import Method
from quantizers.scheme import BnbScheme, FloatScheme, IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.weights import QuantizedWeight


class Bnb(Method):
    """bitsandbytes."""

    name: Literal["bnb"] = "bnb"
    summary: ClassVar[str] = "The int8, nf4 and fp4 formats of bitsandbytes; no data, seconds."

    def check(self, scheme: FloatScheme | IntegerScheme | BnbScheme) -> None:
        if not isinstance(scheme, BnbScheme):
            raise UnsupportedScheme(f"bnb makes the formats int8, nf4 and fp4, not {scheme.slug}: use rtn for it", param="model")

    def apply(self, block: "Block") -> None:
        for name, scheme in block.schemes.items():
            assert isinstance(scheme, BnbScheme), "checked by the recipe"
            block.put(name, quantize_bnb(block.linears[name].weight.detach(), scheme, layer=name))


def quantize_bnb(weight: "Tensor", scheme: BnbScheme, *, layer: str) -> "QuantizedWeight":
    """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer` if it is not finite."""
    import torch

    from quantizers.kernels.bnb import functional
    from quantizers.weights import BNB_BLOCK, QuantizedWeight

    if not bool(torch.isfinite(weight).all()):
        raise QuantizationFailed("its weights hold NaN or infinity: the checkpoint is damaged", layer=layer)
    values = weight.to(torch.float32, copy=True).contiguous()
    if scheme.format == "int8":
        codes, absmax, _ = functional().int8_vectorwise_quant(values)
        codes[absmax == 0] = 0  # bitsandbytes divides zero by zero there, and casts the NaN to an integer
        tensors = {"codes": codes, "absmax": absmax}
    else:
        packed, state = functional().quantize_4bit(values, blocksize=BNB_BLOCK, quant_type=scheme.format)
        tensors = {"codes": packed.view(-1), "absmax": state.absmax}
    return QuantizedWeight(scheme, weight.shape[0], weight.shape[1], tensors)
