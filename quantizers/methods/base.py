"""What every method is: a pydantic model of its options, and the algorithm over one decoder block.

A method's file defines one subclass with `name: Literal["..."]`, which registers itself. The class is plain data until it runs:
torch is imported inside the functions that compute, so that the HTTP process can list methods, schemas and defaults.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from quantizers.scheme import LayerScheme

if TYPE_CHECKING:
    from quantizers.block import Block
    from quantizers.training.whole import Whole
    from quantizers.weights import QuantizedWeight

Stream = Literal["full", "quantized"]  # the tokens as the checkpoint computes them; as the quantized model so far does
LayerGroups = tuple[tuple[tuple[int, int], ...], ...]  # of a block: groups of layers that share an input, each layer (out, in)
FP32_BYTES = 4
METHODS: dict[str, type["Method"]] = {}


def training_bytes(groups: LayerGroups) -> int:
    """While all layers of a block learn: their weights, gradients, both moments, three copies in the making, and what they begin at."""
    return 8 * FP32_BYTES * sum(rows * columns for group in groups for rows, columns in group)


class Method(BaseModel):
    """Base of all methods; a subclass adds its options as fields, each with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: ClassVar[str]
    # A recipe is any number of transforms, then one quantizer. A `smoother` is a transform that may stand last: what it leaves is then
    # rounded to nearest.
    role: ClassVar[Literal["transform", "smoother", "quantizer"]] = "quantizer"
    needs_calibration: ClassVar[bool] = False
    changes_unquantized: ClassVar[bool] = False  # whether norms or biases of a block may change: they go into the artifact too
    keeps_floating: ClassVar[bool] = False  # whether `finish` wants the layers' floating weights beside the quantized ones
    chunk_tokens: ClassVar[int | None] = None  # calibration tokens that run through a block at once, where that is the method's matter

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        METHODS[cls.model_fields["name"].default] = cls

    def streams(self) -> frozenset[Stream]:
        """Which runs of the calibration tokens it looks at."""
        return frozenset()

    def check(self, scheme: LayerScheme) -> None:
        """Raises UnsupportedScheme where this method cannot produce `scheme`."""
        raise NotImplementedError

    def for_trial(self) -> "Method":
        """What is run on the largest layer before all others, to see whether it can: a method that trains takes fewer steps here."""
        return self

    def held_bytes(self, groups: LayerGroups) -> int:  # noqa: ARG002 - most methods hold nothing then
        """What it holds beside weights and activations while calibration tokens run through a block of these layers: its statistics."""
        return 0

    def scratch_bytes(self, groups: LayerGroups) -> int:
        """What it holds beside the block's weights while it chooses the numbers of one layer or group; its statistics included.

        Rounding to nearest holds at most what the stored form stands for and its difference from the weight.
        """
        return 2 * FP32_BYTES * max((rows * columns for group in groups for rows, columns in group), default=0)

    def apply(self, block: "Block") -> None:
        """Work on one decoder block: change its floating weights, or `block.put` quantized layers for them."""
        raise NotImplementedError

    def has_finish(self) -> bool:
        """Whether `finish` is to be called when all blocks are quantized; nothing is written before, and the model has to fit in memory."""
        return False

    def whole_bytes(self, weights: int) -> int:
        """What it holds beside the model while it works on the whole, whose quantized layers have so many weights."""
        raise NotImplementedError

    def finish(self, whole: "Whole") -> "dict[str, QuantizedWeight]":
        """Work on the whole model: by full name the weights of all its quantized layers."""
        raise NotImplementedError
