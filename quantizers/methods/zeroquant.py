"""ZeroQuant (Yao et al. 2022, arXiv 2206.01861): group-wise symmetric weights, token-wise int8 activations, and layer-by-layer knowledge
distillation (section 4.3): every block learns, alone, to give what the full-precision block gives on the full-precision block's inputs.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import LayerGroups, Method, Stream, training_bytes
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from quantizers.block import Block


class ZeroQuant(Method):
    """ZeroQuant.

    steps: of AdamW for each block. learning_rate: of the weights, relative to their root mean square in a layer.
    A block whose trained weights are no better on the samples held back keeps those that were only rounded.
    """

    name: Literal["zeroquant"] = "zeroquant"
    summary: ClassVar[str] = "Round to nearest after every block has learnt to bear it; calibration text, minutes."
    needs_calibration: ClassVar[bool] = True
    chunk_tokens: ClassVar[int | None] = 1024  # one step sees them: two samples of the usual length
    steps: int = Field(default=100, ge=1, le=100_000)
    learning_rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False)

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full",))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme) or not scheme.symmetric:
            raise UnsupportedScheme(
                f"zeroquant makes symmetric integer formats such as w4g64a8, w8a8 or w4g64, not {scheme.slug}", param="model"
            )

    def scratch_bytes(self, groups: LayerGroups) -> int:
        return training_bytes(groups)

    def for_trial(self) -> "ZeroQuant":
        return self.model_copy(update={"steps": 1})

    def apply(self, block: "Block") -> None:
        from quantizers.grid import as_groups, range_grid
        from quantizers.training.blockwise import Rates, reconstruct
        from quantizers.training.learned import LearnedWeight
        from quantizers.training.trainer import Plan

        expected = block.expected()
        inputs = block.streams.full
        assert inputs is not None, "asked for"
        learned = {}
        for name, scheme in block.schemes.items():
            assert isinstance(scheme, IntegerScheme), "checked by the recipe"
            weight = block.linears[name].weight.detach()
            learned[name] = LearnedWeight(weight, range_grid(as_groups(weight, scheme, name), scheme, name), name)
        plan, rates = Plan(steps=self.steps, warmup=0.1), Rates(self.learning_rate)
        for name, quantized in reconstruct(block, learned, inputs, expected, rates, plan).items():
            block.put(name, quantized)
