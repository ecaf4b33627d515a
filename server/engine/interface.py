"""The engine as the HTTP process sees it: token ids in, token ids and log-probabilities out, over an async iterator.

The engine lives in a worker process of its own (`server.engine.worker`); `server.engine.client` implements this protocol over a
Unix socket with msgpack messages. Text (templates, tokenization, stop strings, detokenization) stays with `server.text`. This file
imports no torch. Every struct is a pydantic model, so that what crosses the socket is checked on both sides.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "cancelled"]
MemoryKind = Literal["weights", "shared_weights", "kv_cache", "workspace"]
KvDtype = Literal["auto", "int8"]  # of cached keys and values: the model's own, or bytes with a scale for each token and head


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VariantKey(_Message):
    """`smollm2-135m-instruct@rtn-w4g64` as its two parts: the checkpoint's name and the recipe's slug."""

    model: str
    precision: str

    def __str__(self) -> str:
        return f"{self.model}@{self.precision}"


class Sampling(_Message):
    """How one sequence is continued. Ranges are OpenAI's and are checked here as well as in the HTTP schema."""

    max_tokens: int = Field(ge=0)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0: no limit
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: the engine draws one
    stop_token_ids: tuple[int, ...] = ()  # end of sequence is the checkpoint's own, unless ignore_eos
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)  # None: none; N: the sampled token's and the top N
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    grammar: str | None = None  # that the text must follow, as llguidance spells it (`server.text.grammar`)


class Request(_Message):
    id: str
    variant: VariantKey
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str = ""  # requests with one salt share cached prefixes; give each API key its own, so that none can time another's
    priority: int = 0  # higher goes first; equal ones by deadline, then by arrival
    deadline_seconds: float | None = Field(default=None, gt=0)  # from arrival; a request that has not begun by then fails


class TokenLogprob(_Message):
    """Natural-log probability of `token_id` under the unmodified distribution (no temperature, no penalties), with the top N there."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), best first


class Started(_Message):
    """First event of every accepted request, after its variant is resident and its prompt was checked."""

    event: Literal["started"] = "started"
    prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one a prompt token, the first is None


class Token(_Message):
    """together: how many tokens of the request, this one counted, came out of the worker in one message."""

    event: Literal["token"] = "token"
    token_id: int
    logprob: TokenLogprob | None = None
    together: int = 1


class Finished(_Message):
    """Last event of a request that ended well. `stop`: an end of sequence or stop token id; that token was not sent as a Token event."""

    event: Literal["finished"] = "finished"
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int


class Failed(_Message):
    """Last event of a request that did not. `kind` is the class name of a `quantizers.errors` type."""

    event: Literal["failed"] = "failed"
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_seconds: float | None = None  # of Overloaded


Event = Annotated[Started | Token | Finished | Failed, Field(discriminator="event")]


class VariantSpec(_Message):
    """Where a variant's bytes are: the checkpoint's folder, and the artifact's folder (None for a baseline)."""

    key: VariantKey
    checkpoint_dir: str
    artifact_dir: str | None


class ResidentInfo(_Message):
    """What is in effect for a resident variant, measured after loading. Bytes by kind sum to what the variant holds."""

    key: VariantKey
    device: str
    max_model_len: int
    vocab_size: int
    dtype: str
    kv_dtype: str
    kernels: dict[str, int]  # kernel name -> number of layers that it runs
    predicted_bytes: int
    bytes: dict[MemoryKind, int]
    bytes_by_dtype: dict[str, int]
    load_seconds: float


class MemoryInfo(_Message):
    """The ledger: the device measured by its driver (a process's proportional set size on a CPU), and every resident variant."""

    device: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    budget_bytes: int
    reserved_bytes: int
    shared_bytes: int  # tensors that several residents use, stored once
    residents: tuple[ResidentInfo, ...]


class StepStats(_Message):
    """Sent by the worker about once a second and after each request: gauges that a scrape must not wait for."""

    running: dict[str, int]  # str(VariantKey) -> sequences
    waiting: dict[str, int]
    kv_cache_usage: dict[str, float]
    memory: MemoryInfo
    nonfinite_logits: dict[str, int] = {}  # requests failed for NaN or infinite logits, since the engine started; restarts included
    evictions: dict[str, int] = {}  # variants that made room for others, counted likewise
    preemptions: dict[str, int] = {}  # sequences pushed out of the cache to be computed again, counted likewise
    drafted: dict[str, int] = {}  # tokens that were guessed and verified, counted likewise
    drafted_right: dict[str, int] = {}  # of them, those that were right


class Engine(Protocol):
    """Errors are raised as the types of `quantizers.errors`; EngineUnavailable while the worker is down or restarting."""

    async def start(self) -> None: ...

    async def stop(self, grace_seconds: float) -> None: ...

    def generate(self, request: Request) -> AsyncIterator[Started | Token | Finished]:
        """Events of one request; closing the iterator cancels the request in the worker."""
        ...

    async def load(self, spec: VariantSpec) -> ResidentInfo:
        """Load where not resident yet; concurrent calls for one variant share one load."""
        ...

    async def unload(self, key: VariantKey) -> None: ...

    def residents(self) -> dict[VariantKey, ResidentInfo]:
        """As last reported by the worker; never waits."""
        ...

    def stats(self) -> StepStats | None:
        """As last reported by the worker; never waits."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def restarts(self) -> int: ...
