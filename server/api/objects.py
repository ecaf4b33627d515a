"""Answers as they are described at /openapi.json: a model for every object that a route gives out.

Routes build their answers by hand; what is here is held to them by tests against a running server.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model_store.jobs import Job
from model_store.uploads import Part, Upload
from server.comparison import Comparison
from server.engine.interface import MemoryInfo


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Object):
    """`param` names the field, option or path that was wrong; `code` is a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Object):
    """Every answer that is not a success."""

    error: ErrorDetail


class PromptTokensDetails(_Object):
    cached_tokens: int


class Usage(_Object):
    """A prompt counts once, however many choices continue it; `cached_tokens` of it were found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Object):
    """Parallel lists, one entry a token; a prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Object):
    """`finish_reason` is null before a stream's last chunk of the choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(_Object):
    """Streamed, the same object with pieces of the text; `usage` comes where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class NamedLogprob(_Object):
    """A token's text, its bytes, and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(NamedLogprob):
    top_logprobs: list[NamedLogprob]


class ChatLogprobs(_Object):
    content: list[TokenLogprobs]
    refusal: None


class AnsweredFunction(_Object):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class AnsweredCall(_Object):
    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(_Object):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] = []


class ChatChoice(_Object):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Object):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(_Object):
    name: str | None = None
    arguments: str = ""


class ToolCallDelta(_Object):
    """The first of a call has its id and its function's name, all have pieces of the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(_Object):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] = []


class ChunkChoice(_Object):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(_Object):
    """One event of a streamed answer. An error within the stream is an event of the name `error` with an Error."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A checkpoint under its bare name, or a variant. What of `resident` on is there only while it is in the device's memory."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    variant: str
    precision: str
    method: str | None
    numbers: dict[str, Any] = Field(alias="scheme")
    activation_bits: int | None
    bytes: int | None
    report: dict[str, Any] | None
    resident: bool
    memory: dict[str, int] | None
    kernels: dict[str, int] | None
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None


class ModelList(_Object):
    object: Literal["list"]
    data: list[Model]


class Unloaded(_Object):
    id: str
    object: Literal["model"]
    resident: Literal[False]


class Memory(_Object):
    object: Literal["memory"]
    memory: MemoryInfo | None


class MeasuredSideBySide(Comparison):
    object: Literal["comparison"]


class UploadWithParts(Upload):
    parts: list[Part]


class Deleted(_Object):
    id: str
    object: Literal["file", "checkpoint"]
    deleted: Literal[True]


class CheckpointEntry(BaseModel):
    """A checkpoint and the facts of its files."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["checkpoint"]
    created: int
    bytes: int
    name: str
    digest: str
    files: dict[str, Any]


class CreatedCheckpoint(CheckpointEntry):
    jobs: list[Job]


class CheckpointList(_Object):
    object: Literal["list"]
    data: list[CheckpointEntry]


class MethodEntry(_Object):
    """`schema` is the JSON schema of the method's options, `defaults` their values where none are given."""

    id: str
    object: Literal["method"]
    summary: str
    needs_calibration: bool
    options: dict[str, Any] = Field(alias="schema")
    defaults: dict[str, Any]


class MethodList(_Object):
    object: Literal["list"]
    data: list[MethodEntry]


class JobList(_Object):
    object: Literal["list"]
    data: list[Job]


class Health(_Object):
    status: Literal["ok"]


class Ready(_Object):
    """`models`: what was to be loaded at the start or is resident, and whether it is."""

    ready: bool
    engine: bool
    models: dict[str, bool]


class Version(_Object):
    version: str
    python: str
