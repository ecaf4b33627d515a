"""A canary: the log-probabilities that a variant's numbers give a fixed text, kept with the artifact and asked for again at every load.

They are recorded in reference arithmetic, so they hold on every device and for every kernel. Where a loaded variant gives others, its
files or its kernels do not compute what was quantized and measured, and it must not serve. Plain data until it computes.
"""

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantizers.errors import CorruptData, QuantizationFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Prose, counting and code, so that wrong weights anywhere show in some of its tokens.
TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. One, two, three, four, five. def add(a, b): return a + b "
    "The sun rises in the east and sets in the west. Water boils at 100 degrees. import os; print(os.getcwd())"
)
TOKENS = 64
# Nats a token on average that kernels may be off. With 64 tokens of a model of 135 million parameters the kernels that serve were off by
# 0.06 (w8) to 0.19 (w8a8), the noise of whose arithmetic was 0.03 and 0.24; one layer's rows in a wrong order by 0.5 and 0.6.
ALLOWED, ALLOWED_NOISE = 0.25, 1.5
_LOWEST = -1000.0  # nats: what lies below is as impossible
_ADVICE = "its files or the kernels of this machine are wrong. Delete the variant and quantize it again; `precis doctor` lists the kernels"


class Canary(BaseModel):
    """logprobs: of each of the `tokens` but the first, given those before it, natural logarithm, in fp32.

    noise: how far the same numbers in bf16 arithmetic are from that, mean absolute difference: rounding carries far in some models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...] = Field(min_length=2)
    logprobs: tuple[float, ...]
    noise: float = Field(ge=0, allow_inf_nan=False)

    @property
    def allowed(self) -> float:
        """Nats a token on average, by which what serves may be off."""
        return ALLOWED + ALLOWED_NOISE * self.noise

    @model_validator(mode="after")
    def _one_each(self) -> "Canary":
        if len(self.logprobs) != len(self.tokens) - 1 or not all(_LOWEST <= value <= 0 for value in self.logprobs):
            raise ValueError("a log-probability for every token but the first, none above 0")
        return self


def record(tokens: "Sequence[int]", exact: "Tensor", rounded: "Tensor") -> Canary:
    """Logits [tokens, vocabulary] of `tokens` by reference arithmetic in fp32 and in bf16. Raises QuantizationFailed where they are not
    finite.
    """
    found, noisy = _logprobs(tokens, exact), _logprobs(tokens, rounded)
    if found is None or noisy is None:
        raise QuantizationFailed("the quantized model gives logits that are not finite: this recipe does not work for this model")
    return Canary(tokens=tuple(tokens), logprobs=tuple(found), noise=_off(found, noisy))


def read(stored: Any, what: str) -> Canary:
    """A manifest's `stored` canary; `what` names the variant. Raises CorruptData where it is none."""
    try:
        return Canary.model_validate(stored)
    except ValidationError as error:
        raise CorruptData(f"the canary in the manifest of {what} cannot be read: delete the variant and quantize it again") from error


def check(canary: Canary, logits: "Tensor", what: str) -> None:
    """`logits` [tokens, vocabulary] of the canary's tokens by what is to serve; `what` names the variant.

    Raises CorruptData where they are not finite or the log-probabilities are off by more than is allowed.
    """
    found = _logprobs(canary.tokens, logits)
    if found is None:
        raise CorruptData(f"{what} gives logits that are not finite: {_ADVICE}")
    off = _off(found, canary.logprobs)
    if off > canary.allowed:
        raise CorruptData(
            f"{what} does not compute what was quantized: the log-probabilities of its canary are off by {off:.2f} nats on average, "
            f"allowed are {canary.allowed:.2f}; {_ADVICE}"
        )


def _off(found: "Sequence[float]", expected: "Sequence[float]") -> float:
    return sum(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True)) / len(found)


def _logprobs(tokens: "Sequence[int]", logits: "Tensor") -> list[float] | None:
    """None where a logit is not finite."""
    import torch

    if not bool(torch.isfinite(logits).all()):
        return None
    following = torch.tensor(list(tokens[1:]), device=logits.device)
    chosen = torch.log_softmax(logits[:-1].float(), -1).gather(1, following[:, None]).squeeze(1)
    return [float(value) for value in chosen.clamp(min=_LOWEST, max=0)]
