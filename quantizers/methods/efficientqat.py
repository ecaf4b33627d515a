"""EfficientQAT (Chen et al. 2024, arXiv 2407.11062).

Block-AP (section 3.2): block after block, the weights, scales and zeros of its layers learn to give what the full-precision block gives on
the full-precision model's hidden states, from the hidden states that the quantized blocks before it leave. E2E-QP (section 3.3): then the
integers are frozen, and the scales of the whole model learn to give the checkpoint's distribution. Two things are not the original's: the
second phase's loss is KL to the checkpoint instead of the text's own next tokens, and a real minimum learns there beside its scale.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import FP32_BYTES, METHODS, LayerGroups, Method, Stream, training_bytes
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from quantizers.block import Block
    from quantizers.training.learned import LearnedWeight
    from quantizers.training.whole import Whole
    from quantizers.weights import QuantizedWeight


class EfficientQat(Method):
    """EfficientQAT.

    start: what training begins at, the numbers that this method would choose. epochs: how often a block sees the calibration text; 0:
    blocks stay as they start. weight_rate and grid_rate: learning rates of the weights, relative to their root mean square in a layer, and
    of scales and zeros, relative to the layer's mean scale. end_epochs: how often the whole model sees the text; 0: it is not trained as a
    whole, and need not fit in memory. end_rate: learning rate of the scales there, relative to the layer's mean scale.
    """

    name: Literal["efficientqat"] = "efficientqat"
    summary: ClassVar[str] = "Train each block against the unquantized one, then all scales end to end, for 2 and 3 bits; tens of minutes."
    needs_calibration: ClassVar[bool] = True
    chunk_tokens: ClassVar[int | None] = 1024  # one step sees them: two samples of the usual length
    start: Literal["rtn", "hqq", "gptq"] = "gptq"
    epochs: int = Field(default=4, ge=0, le=10_000)
    weight_rate: float = Field(default=3e-2, ge=0, le=1, allow_inf_nan=False)
    grid_rate: float = Field(default=1e-3, ge=0, le=1, allow_inf_nan=False)
    end_epochs: int = Field(default=4, ge=0, le=10_000)
    end_rate: float = Field(default=3e-3, gt=0, le=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something_is_trained(self) -> "EfficientQat":
        if not self.end_epochs and not (self.epochs and (self.weight_rate or self.grid_rate)):
            raise ValueError(f"nothing is trained: give epochs and a rate, or end_epochs, or use {self.start}")
        return self

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full", "quantized"))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"efficientqat makes integer formats such as w2g64, w3g64z or w4g64, not {scheme.slug}", param="model")
        METHODS[self.start](name=self.start).check(scheme)

    def for_trial(self) -> "EfficientQat":
        return self.model_copy(update={"epochs": min(self.epochs, 1)})

    def held_bytes(self, groups: LayerGroups) -> int:
        return METHODS[self.start](name=self.start).held_bytes(groups)

    def scratch_bytes(self, groups: LayerGroups) -> int:
        return max(training_bytes(groups) if self.epochs else 0, METHODS[self.start](name=self.start).scratch_bytes(groups))

    def has_finish(self) -> bool:
        return self.end_epochs > 0

    def whole_bytes(self, weights: int) -> int:
        """Codes, and values while it is measured what they lose."""
        return (2 + FP32_BYTES) * weights

    def apply(self, block: "Block") -> None:
        from quantizers.training.blockwise import Rates, reconstruct, split
        from quantizers.training.trainer import Plan

        started = block.rehearse(METHODS[self.start](name=self.start))
        if self.epochs:
            expected, inputs = block.expected(), block.streams.quantized
            assert inputs is not None, "asked for"
            learned = {name: self._learned(block, name, weight) for name, weight in started.items()}
            plan = Plan(steps=self.epochs * len(split(block.streams.chunks)[0]), warmup=0.05)
            started = reconstruct(block, learned, inputs, expected, Rates(self.weight_rate, self.grid_rate), plan)
        for name, quantized in started.items():
            block.put(name, quantized)

    def _learned(self, block: "Block", name: str, weight: "QuantizedWeight") -> "LearnedWeight":
        """On the grid of `weight`: its own values where they are more than the layer's rounded ones."""
        from quantizers.grid import grid_of
        from quantizers.training.learned import LearnedWeight

        values = weight.dequantize() if self.start == "gptq" else block.linears[name].weight.detach()
        return LearnedWeight(values, grid_of(weight), name)

    def finish(self, whole: "Whole") -> "dict[str, QuantizedWeight]":
        from quantizers.training.frozen import FrozenCodes
        from quantizers.training.learned import SMALLEST_SCALE
        from quantizers.training.trainer import ParameterGroup
        from quantizers.training.whole import distil

        learning = {name: FrozenCodes(weight, name) for name, weight in whole.weights.items()}
        groups = []
        for name, each in learning.items():
            rate = self.end_rate * float(each.scale.detach().mean())
            groups.append(ParameterGroup({f"{name}.scale": each.scale}, rate, low=SMALLEST_SCALE))
            if each.minimum is not None:
                groups.append(ParameterGroup({f"{name}.minimum": each.minimum}, rate))
        return distil(whole, learning, groups, self.end_epochs)
