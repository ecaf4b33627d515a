"""Requests of the generation routes, as OpenAI has them. A field is implemented here or refused with its name; never ignored in silence.

Types are strict: a string is no number, a boolean is no integer. A field whose value is null counts as absent.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from quantizers.errors import InvalidInput
from server.api.errors import describe

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
_PART: JsonSchemaValue = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT: JsonSchemaValue = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}
_NAMED: JsonSchemaValue = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False},
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
_TOOL_CHOICE: JsonSchemaValue = {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED]}


class ApiModel(BaseModel):
    """Strict, closed, and blind to nulls."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic makes it, with null allowed wherever a field may be absent."""
        schema = handler.resolve_ref_schema(handler(core))
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            if name not in required and {"type": "null"} not in field.get("anyOf", ()):
                description = {key: field.pop(key) for key in ("default", "title", "description") if key in field}
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **description}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


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


def _content(value: Any) -> str:
    """A message's text: a string, or text parts joined as they are."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("should be a text or a list of parts of the type 'text'")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"has a part of the type {describe(kind)}; only parts {{'type': 'text', 'text': ...}} are implemented")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("has a text part whose fields are not exactly 'type' and 'text', a string")
        texts.append(part["text"])
    return "".join(texts)


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
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias), WithJsonSchema(_LOGIT_BIAS)] = {}
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_TOKENS)]] = Field(default=[], max_length=64)
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field(default="", max_length=256)
    user: str | None = Field(default=None, max_length=1024)
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata), WithJsonSchema(_METADATA)] = {}

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


def _arguments(value: Any) -> dict[str, Any]:
    """Arguments of a call as templates want them: an object, from its JSON text."""
    try:
        arguments = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("should be a text that is a JSON object")
    return arguments


class CalledFunction(ApiModel):
    name: str = Field(max_length=256)
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments), WithJsonSchema({"type": "string"})]


class ToolCall(ApiModel):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(ApiModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema(_CONTENT)] | None = None
    name: str | None = Field(default=None, max_length=256)  # given to the template, which may show it
    refusal: str | None = None  # clients send an answer back as it came, where this is null
    tool_calls: list[ToolCall] = Field(default=[], max_length=128)
    tool_call_id: str | None = Field(default=None, max_length=256)

    @property
    def of_tools(self) -> bool:
        return bool(self.tool_calls) or self.role == "tool"

    def check(self, param: str) -> None:
        """Raises InvalidInput where fields do not go with the role; `param` is the message's path."""
        if self.content is None and not self.tool_calls:
            raise InvalidInput(f"the field '{param}.content' is required", param=f"{param}.content", code="missing_field")
        if self.tool_calls and self.role != "assistant":
            raise InvalidInput(f"{param}: only a message of the assistant has tool_calls", param=f"{param}.tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise InvalidInput(f"{param}: tool_call_id belongs to messages of the role 'tool'", param=f"{param}.tool_call_id")
        if self.refusal is not None:
            raise InvalidInput(f"{param}: refusal has no place in a template: put it into content", param=f"{param}.refusal")

    def for_template(self) -> dict[str, Any]:
        """`developer` is OpenAI's newer word for `system`, which is what templates know."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class JsonSchema(ApiModel):
    """`strict` is accepted and changes nothing: every schema is followed to the letter or refused. The description goes nowhere."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(default=None, max_length=4096)
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool = False


class ResponseFormat(ApiModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidInput(
                "response_format.json_schema belongs to the type 'json_schema', and to that only", param="response_format.json_schema"
            )
        return self


class Function(ApiModel):
    """`strict`: calls follow `parameters` to the letter; otherwise a model's call may hold any arguments."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(default=None, max_length=1 << 16)
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False


class Tool(ApiModel):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}


def _tool_choice(value: Any) -> str:
    """The mode, or `=` and the name of the one function."""
    if value in ("none", "auto", "required"):
        return str(value)
    if isinstance(value, dict) and value.get("type") == "function" and set(value) == {"type", "function"}:
        function = value["function"]
        if isinstance(function, dict) and set(function) == {"name"} and isinstance(function["name"], str):
            return f"={function['name']}"
    raise ValueError("should be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}")


_FUNCTIONS = "it is OpenAI's older form: send 'tools' and 'tool_choice'"


class ChatRequest(GenerationRequest):
    not_implemented: ClassVar[dict[str, str]] = {
        "functions": _FUNCTIONS,
        "function_call": _FUNCTIONS,
        "audio": "answers are text only",
        "modalities": "answers are text only; leave it out",
        "prediction": "leave it out; it changes speed only",
        "reasoning_effort": "the models here take no such setting; leave it out",
    }

    messages: list[Message]
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: Annotated[str | None, BeforeValidator(_tool_choice), WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _chat_fits_together(self) -> "ChatRequest":
        if not self.messages:
            raise InvalidInput("messages is empty: send at least one message", param="messages")
        for index, message in enumerate(self.messages):
            message.check(f"messages.{index}")
        self._check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput('top_logprobs needs "logprobs": true', param="top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidInput("max_tokens and max_completion_tokens differ: send only max_completion_tokens", param="max_tokens")
        if self.answers_json:
            for name in self.model_fields_set & {"min_tokens", "ignore_eos"}:
                raise InvalidInput(f"{name} does not go with a JSON response_format, whose text ends where the JSON does", param=name)
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools]
        for index, tool in enumerate(self.tools):
            if tool.function.name in names[:index]:
                raise InvalidInput(f"two tools have the name {tool.function.name!r}", param=f"tools.{index}.function.name")
            if tool.function.parameters.get("type", "object") != "object":
                param = f"tools.{index}.function.parameters"
                raise InvalidInput(f"{param}: arguments are an object, so its type must be 'object'", param=param)
        for field in ("tool_choice", "parallel_tool_calls"):
            if field in self.model_fields_set and not self.tools and self.tool_choice != "none":
                raise InvalidInput(f"{field} needs tools", param=field)
        if self.tool_choice is not None and self.tool_choice.startswith("=") and self.tool_choice[1:] not in names:
            raise InvalidInput(f"tool_choice names {self.tool_choice[1:]!r}, which is none of the tools", param="tool_choice")
        if self.calls_tools and self.answers_json:
            raise InvalidInput("response_format does not go with tools: an answer is JSON or may call a tool", param="response_format")

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def answers_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprob_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
