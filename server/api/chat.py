"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response

from quantizers.errors import InvalidInput
from server.api.answer import answer
from server.api.conversation import ChatRequest, ResponseFormat
from server.api.description import described
from server.api.generation import Piece, Prompt, ShownToken, json_logprob
from server.api.objects import ChatCompletion, ChatCompletionChunk
from server.text.chat import render_chat
from server.text.grammar import schema_grammar
from server.text.tokenizer import Tokenizer
from server.text.tool_grammar import Function, calls_or_text, forced_calls
from server.text.tools import CallDelta, ToolFormat, format_of, merged, template_has_tools

router = APIRouter()


class ChatDialect:
    endpoint = "chat.completions"
    body = ChatRequest
    prompt_param = "messages"
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    async def prompts(self, body: ChatRequest, tokenizer: Tokenizer) -> list[Prompt]:
        tools = _tool_format(body, tokenizer)
        grammar = await _grammar(body.response_format) if tools is None else await _tool_grammar(body, tools, tokenizer)
        described = [tool.for_template() for tool in body.tools] if tools is not None else None
        text = await render_chat(tokenizer, [message.for_template() for message in body.messages], tools=described)
        token_ids = tuple(await tokenizer.encode(text, special=False))  # the template wrote the special tokens
        return [Prompt(token_ids, text, grammar, tools, single_call=not body.parallel_tool_calls)]

    def whole(self, body: ChatRequest, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": _message(piece),
            "logprobs": _logprobs(body, piece, tokenizer),
            "finish_reason": piece.finish_reason,
        }

    def chunk(self, body: ChatRequest, piece: Piece, tokenizer: Tokenizer, *, first: bool) -> dict[str, Any] | None:
        if not (first or piece.text or piece.calls or piece.finish_reason or (piece.tokens and body.logprobs)):
            return None
        delta: dict[str, Any] = {"role": "assistant", "content": piece.text} if first else {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": _logprobs(body, piece, tokenizer),
            "finish_reason": piece.finish_reason,
        }


def _message(piece: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
    if piece.calls:
        message["content"] = piece.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in merged(piece.calls)
        ]
    return message


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_format(body: ChatRequest, tokenizer: Tokenizer) -> ToolFormat | None:
    """How calls are written, None where the answer may hold none. Raises InvalidInput where the template has no tools."""
    found = format_of(tokenizer.tool_template or "")
    if found is not None:
        return found if body.calls_tools else None
    what = (
        "the format of this checkpoint's chat template for tools is not known"
        if template_has_tools(tokenizer.tool_template)
        else ("this checkpoint's chat template has no tools")
    )
    advice = "take a checkpoint whose template has them (as Qwen, Llama 3 and Mistral do), or describe them in a message and ask for JSON"
    if body.calls_tools:
        raise InvalidInput(f"{what}: {advice} with response_format", param="tools", code="tools_not_supported")
    for index, message in enumerate(body.messages):
        if message.of_tools:
            raise InvalidInput(f"{what}: {advice}", param=f"messages.{index}", code="tools_not_supported")
    return None


async def _tool_grammar(body: ChatRequest, tools: ToolFormat, tokenizer: Tokenizer) -> str | None:
    """What the answer must follow: calls only, calls as strict functions say, or nothing.

    Raises InvalidInput with the path of what is wrong in a schema that is to be followed.
    """
    forced = body.tool_choice is not None and body.tool_choice not in ("auto", "none")
    if not forced and not any(tool.function.strict for tool in body.tools):
        return None
    functions = []
    for index, tool in enumerate(body.tools):
        if body.tool_choice == f"={tool.function.name}" or body.tool_choice in (None, "auto", "required"):
            parameters = tool.function.parameters if forced or tool.function.strict else {"type": "object"}
            await schema_grammar({"type": "object", **parameters}, f"tools.{index}.function.parameters")
            functions.append(Function(tool.function.name, {"type": "object", **parameters}))
    single = not body.parallel_tool_calls or (body.tool_choice or "").startswith("=")
    make = forced_calls if forced else calls_or_text
    return make(tools, functions, tokenizer.special_id, single=single)


async def _grammar(response_format: ResponseFormat | None) -> str | None:
    """What the answer must follow. Raises InvalidInput with the path of what is wrong in a schema."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return await schema_grammar({"type": "object"}, "response_format")
    return await schema_grammar(response_format.json_schema.schema_, "response_format.json_schema.schema")


def _logprobs(body: ChatRequest, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": [_token(token, tokenizer) for token in piece.tokens], "refusal": None}


def _token(token: ShownToken, tokenizer: Tokenizer) -> dict[str, Any]:
    assert token.logprob is not None  # the engine was asked for them, and a chat has no prompt tokens
    top = [_named(token_id, logprob, tokenizer) for token_id, logprob in token.logprob.top]
    return {**_named(token.token_id, token.logprob.logprob, tokenizer), "top_logprobs": top}


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token": tokenizer.token_text(token_id), "logprob": json_logprob(logprob), "bytes": list(tokenizer.token_bytes(token_id))}


DIALECT = ChatDialect()


@router.post("/v1/chat/completions", **described(ChatCompletion, 404, 507, body=ChatRequest, events=ChatCompletionChunk))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation through the checkpoint's chat template."""
    return await answer(request, DIALECT)
