"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.answer import answer
from server.api.generation import Piece, Prompt, ShownToken, json_logprob
from server.api.schema import ChatRequest, ResponseFormat
from server.text.chat import render_chat
from server.text.grammar import schema_grammar
from server.text.tokenizer import Tokenizer

router = APIRouter()


class ChatDialect:
    endpoint = "chat.completions"
    body = ChatRequest
    prompt_param = "messages"
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    async def prompts(self, body: ChatRequest, tokenizer: Tokenizer) -> list[Prompt]:
        grammar = await _grammar(body.response_format)
        text = await render_chat(tokenizer, [message.for_template() for message in body.messages])
        return [Prompt(tuple(await tokenizer.encode(text, special=False)), text, grammar)]  # the template wrote the special tokens

    def whole(self, body: ChatRequest, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": _logprobs(body, piece, tokenizer),
            "finish_reason": piece.finish_reason,
        }

    def chunk(self, body: ChatRequest, piece: Piece, tokenizer: Tokenizer, *, first: bool) -> dict[str, Any] | None:
        if not (first or piece.text or piece.finish_reason or (piece.tokens and body.logprobs)):
            return None
        delta: dict[str, str] = {"role": "assistant", "content": piece.text} if first else {}
        if piece.text:
            delta["content"] = piece.text
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": _logprobs(body, piece, tokenizer),
            "finish_reason": piece.finish_reason,
        }


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


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Continue a conversation through the checkpoint's chat template."""
    return await answer(request, DIALECT)
