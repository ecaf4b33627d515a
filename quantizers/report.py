"""What was measured for a variant. Plain data, no torch: every process reads reports."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Report(BaseModel):
    """Quality against the checkpoint's own fp32, and what the precision costs, measured through the kernels that serve.

    Two reports are comparable where `text_sha256`, `windows`, `window_tokens` and `device` are the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    text: str
    text_sha256: str
    windows: int = Field(ge=1)
    window_tokens: int = Field(ge=2)
    device: str
    kernels: dict[str, int]  # kernel name -> linear layers that it ran
    perplexity: NotNegative  # exp of the mean negative log-likelihood of every token but a window's first
    kl_divergence: NotNegative  # mean KL(reference || variant) in nats a token
    kl_divergence_p99: NotNegative  # 99th percentile over tokens
    top1_agreement: Ratio  # share of tokens whose likeliest successor is the reference's
    bytes: dict[str, int]  # by kind, as `quantizers.model.LoadedModel` counts them
    decode_tokens_per_second: NotNegative  # greedy, batch of one, after warm-up
