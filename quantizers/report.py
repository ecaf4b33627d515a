"""What was measured for a variant. Plain data, no torch: every process reads reports."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputRange(_Frozen):
    """How wide the input of some layers is, over all tokens: of the largest magnitudes of its channels, the largest and the median."""

    layer: str  # full name of the first of the layers that take this input
    largest: NotNegative
    median: NotNegative

    @property
    def outlier(self) -> float:
        """Largest over median channel: how much of an int8 token's range is spent on one channel; 1 for an input of zeros."""
        return self.largest / self.median if self.median > 0 else 1.0


class Activations(_Frozen):
    """inputs: in the order of the model. channels: of the input `widest`, the one with the worst outliers in the checkpoint, the largest
    magnitude of every channel.
    """

    inputs: tuple[InputRange, ...]
    widest: str
    channels: tuple[NotNegative, ...]


class Profile(_Frozen):
    """What happens along the depth of the model, in fp32 reference arithmetic.

    block_errors: of each decoder block's output, the root of the mean over tokens of ||y' - y||^2 / ||y||^2 against the checkpoint's,
    errors of the blocks before included. before, after: inputs of layers as the checkpoint has them, and as the variant has them where a
    method moves scales between activations and weights.
    """

    block_errors: tuple[NotNegative, ...]
    before: Activations
    after: Activations | None = None


class Quantization(_Frozen):
    """What making the variant cost: seconds, and the most bytes that it held beyond what the process held before."""

    seconds: NotNegative
    peak_bytes: int = Field(ge=0)
    predicted_peak_bytes: int | None = Field(None, ge=0)


def quantization_of(facts: Mapping[str, Any]) -> Quantization | None:
    """From the facts of a manifest, which are a `QuantizationResult` for a quantized variant and empty for a baseline."""
    return Quantization(**{key: facts[key] for key in Quantization.model_fields if key in facts}) if facts else None


class Report(_Frozen):
    """Quality against the checkpoint's own fp32, and what the precision costs, measured through the kernels that serve.

    Two reports are comparable where `text_sha256`, `windows`, `window_tokens` and `device` are the same.
    """

    recipe: str
    text: str
    text_sha256: str
    windows: int = Field(ge=1)
    window_tokens: int = Field(ge=2)
    device: str
    kernels: dict[str, int]  # kernel name -> linear layers that it ran
    kv_dtype: str | None = None  # of the cached keys and values that it was measured with; older reports do not say
    perplexity: NotNegative  # exp of the mean negative log-likelihood of every token but a window's first
    kl_divergence: NotNegative  # mean KL(reference || variant) in nats a token
    kl_divergence_p99: NotNegative  # 99th percentile over tokens
    top1_agreement: Ratio  # share of tokens whose likeliest successor is the reference's
    reference_kl_divergence: NotNegative | None = None  # the same of the same numbers in fp32 reference arithmetic; none for a baseline
    bytes: dict[str, int]  # by kind, as `quantizers.model.LoadedModel` counts them
    decode_tokens_per_second: NotNegative  # greedy, batch of one, after warm-up
    quantization: Quantization | None = None  # none for a baseline
    profile: Profile | None = None

    @property
    def kernel_difference(self) -> float | None:
        """By which share of the artifact's own KL the executed kernels differ from reference arithmetic: 0.02 is 2 % more."""
        if not self.reference_kl_divergence:
            return None
        return self.kl_divergence / self.reference_kl_divergence - 1

    def comparable(self, other: "Report") -> bool:
        """Whether both measured the same text in the same windows on the same kind of device."""
        mine, theirs = ((each.text_sha256, each.windows, each.window_tokens, each.device) for each in (self, other))
        return mine == theirs
