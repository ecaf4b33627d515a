"""LLM-QAT (Liu et al. 2023, arXiv 2305.17888): the whole model learns, with weights and tokens rounded in every forward pass, to give the
checkpoint's distribution; then it is rounded to nearest for good. Text to learn on can be given, or written by the model itself
(`quantizers.generated`). Keys and values are rounded as well where the cache that serves is to be in bytes.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import FP32_BYTES, Method, Stream
from quantizers.methods.rtn import Rtn
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.training.trainer import ParameterGroup
    from quantizers.training.whole import Whole
    from quantizers.weights import QuantizedWeight


class LlmQat(Method):
    """LLM-QAT.

    epochs: how often the model sees the calibration text. learning_rate: of the weights, relative to their root mean square in a layer.
    lora_rank: train a product of that rank beside each weight, folded into it before rounding; 0: the weights themselves.
    labels: how much the text's own next tokens count beside the checkpoint's distribution. int8_cache: round keys and values too, as a
    cache in bytes does.
    """

    name: Literal["llm-qat"] = "llm-qat"
    summary: ClassVar[str] = "Train the whole model through its rounding to give the checkpoint's distribution; tens of minutes."
    needs_calibration: ClassVar[bool] = True
    keeps_floating: ClassVar[bool] = True
    chunk_tokens: ClassVar[int | None] = 1024  # one step sees them: two samples of the usual length
    epochs: int = Field(default=2, ge=1, le=10_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1, allow_inf_nan=False)
    lora_rank: int = Field(default=0, ge=0, le=1024)
    labels: float = Field(default=0, ge=0, le=10, allow_inf_nan=False)
    int8_cache: bool = False

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full",))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"llm-qat makes integer formats such as w4a8, w4g64a8 or w8a8, not {scheme.slug}", param="model")

    def has_finish(self) -> bool:
        return True

    def whole_bytes(self, weights: int) -> int:
        """Weights before training and since, and gradients and two moments where all of them learn, else rounded values for measuring."""
        return (3 if self.lora_rank else 5) * FP32_BYTES * weights

    def apply(self, block: "Block") -> None:
        Rtn(name="rtn").apply(block)

    def finish(self, whole: "Whole") -> "dict[str, QuantizedWeight]":
        from quantizers.training.cache import rounding_cache
        from quantizers.training.ranged import AdaptedWeight, RangedWeight
        from quantizers.training.whole import distil

        learning: dict[str, RangedWeight] = {}
        for name, weight in whole.floating.items():
            scheme = whole.weights[name].scheme
            assert isinstance(scheme, IntegerScheme), "checked by the recipe"
            learning[name] = AdaptedWeight(weight, scheme, name, self.lora_rank) if self.lora_rank else RangedWeight(weight, scheme, name)
        groups = [group for name, each in learning.items() for group in self._groups(name, each.leaves(), whole.floating[name])]
        with rounding_cache(whole.model) if self.int8_cache else nullcontext():
            return distil(whole, learning, groups, self.epochs, labels=self.labels)

    def _groups(self, name: str, leaves: "dict[str, Tensor]", weight: "Tensor") -> "list[ParameterGroup]":
        """A step moves a weight by the learning rate times the root mean square; with an adapter too, whose `down` has rows of length 1."""
        from quantizers.training.trainer import ParameterGroup

        rate = self.learning_rate * float(weight.square().mean().sqrt())
        return [
            ParameterGroup({f"{name}.{leaf}": tensor}, self.learning_rate if leaf == "down" else rate) for leaf, tensor in leaves.items()
        ]
