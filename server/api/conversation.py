"""The body of a chat completion, as OpenAI has it: messages, tools, and what the answer is to look like.

What it shares with completions, and how fields are refused, is in `schema`.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue

from quantizers.errors import InvalidInput
from server.api.errors import describe
from server.api.schema import MAX_TOKENS, GenerationRequest
from server.api.strict import ApiModel

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
    parameters: dict[str, Any] = Field(default={"type": "object", "properties": {}})
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
