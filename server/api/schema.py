"""Requests of the generation routes, as OpenAI has them. A field is implemented here or refused with its name; never ignored in silence.

Types are strict: a string is no number, a boolean is no integer. A field whose value is null counts as absent.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue

from quantizers.errors import InvalidInput
from server.api.errors import describe
from server.api.strict import ApiModel

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters; every new token is compared with every stop string
MAX_TOKENS = 1 << 31  # beyond any context; the model's own is checked when it is known
INT64 = 1 << 63


_TOKEN_ID: JsonSchemaValue = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_TOKENS}
_TOKEN_IDS: JsonSchemaValue = {"type": "array", "items": _TOKEN_ID, "minItems": 1}
_TEXTS: JsonSchemaValue = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS}
_PROMPT: JsonSchemaValue = {
    "anyOf": [{"type": "string"}, _TEXTS, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS}]
}
_ONE_STOP: JsonSchemaValue = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOP: JsonSchemaValue = {"anyOf": [_ONE_STOP, {"type": "array", "items": _ONE_STOP, "maxItems": MAX_STOPS}]}
_LOGIT_BIAS: JsonSchemaValue = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_METADATA: JsonSchemaValue = {
    "type": "object",
    "maxProperties": 16,
    "propertyNames": {"maxLength": 64},
    "additionalProperties": {"type": "string", "maxLength": 512},
}


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Every form of `prompt` as a list of prompts: a text, texts, token ids, lists of token ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("should be a text, a list of texts, a list of token ids or a list of lists of token ids, none of them empty")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"should hold at most {MAX_PROMPTS} prompts")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    if all(isinstance(prompt, list) and prompt and all(_is_token_id(token) for token in prompt) for prompt in prompts):
        return prompts
    raise ValueError("should hold either texts or non-empty lists of token ids (integers from 0), not a mixture")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKENS


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"should be a text or a list of at most {MAX_STOPS} texts")
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"should hold texts of 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("should be an object from token id to a number from -100 to 100")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # isdecimal alone would take other scripts' digits
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < MAX_TOKENS):
            raise ValueError(f"has the key {describe(key)}, which is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"gives token {key} the bias {describe(bias)}; a bias is a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 16:
        raise ValueError("should be an object of at most 16 texts")
    for key, text in value.items():
        if len(key) > 64 or not isinstance(text, str) or len(text) > 512:
            raise ValueError("should map keys of up to 64 characters to texts of up to 512")
    return value


class StreamOptions(ApiModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(ApiModel):
    """What both routes share. Ranges are OpenAI's; `top_k`, `min_p`, `min_tokens`, `ignore_eos`, `repetition_penalty`,
    `stop_token_ids` and `cache_salt` (requests of one key share cached prefixes where it is the same) are the extensions that other
    self-hosted servers have, under their names.

    `user` and `metadata` are accepted and recorded nowhere: they change no answer at OpenAI either.
    """

    not_implemented: ClassVar[dict[str, str]] = {}

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    min_tokens: int = Field(default=0, ge=0, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_TOKENS)  # 0 and, as elsewhere, -1: no limit
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS)] = Field(default={})
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP)] = Field(default=[])
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_TOKENS)]] = Field(default=[], max_length=64)
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field(default="", max_length=256)
    user: str | None = Field(default=None, max_length=1024)
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata), WithJsonSchema(_METADATA)] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_implemented(cls, value: Any) -> Any:
        for name in cls.not_implemented.keys() & (value.keys() if isinstance(value, dict) else set()):
            if value[name] is not None:
                raise InvalidInput(f"{name!r} is not implemented: {cls.not_implemented[name]}", param=name, code="not_implemented")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidInput('stream_options needs "stream": true', param="stream_options")
        limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidInput(f"min_tokens is {self.min_tokens}, above the limit of {limit} tokens", param="min_tokens")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None: what the context leaves."""
        return self.max_tokens

    @property
    def top_logprob_count(self) -> int | None:
        """None: no log-probabilities; N: those of the sampled tokens and of the N best."""
        raise NotImplementedError

    @property
    def candidates(self) -> int:
        """Choices to generate for each prompt, of which the `n` best are the answer."""
        return self.n

    @property
    def echoes_prompt(self) -> bool:
        return False

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationRequest):
    not_implemented: ClassVar[dict[str, str]] = {"suffix": "text is only continued at its end; put what belongs before it into 'prompt'"}

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT)]
    max_tokens: int | None = Field(default=16, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=20)

    @model_validator(mode="after")
    def _best_of_is_possible(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidInput(f"best_of is {self.best_of}, less than the {self.n} of n that are to be the best of them", param="best_of")
        if self.candidates > self.n and self.stream:
            raise InvalidInput(
                "best_of cannot be streamed: which are the best is known at the end only; leave out stream, or let best_of equal n",
                param="best_of",
            )
        return self

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def top_logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def echoes_prompt(self) -> bool:
        return self.echo
