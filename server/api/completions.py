"""POST /v1/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.answer import answer
from server.api.description import described
from server.api.generation import Piece, Prompt, ShownToken, json_logprob
from server.api.objects import Completion
from server.api.schema import CompletionRequest
from server.text.tokenizer import Tokenizer

router = APIRouter()


class CompletionsDialect:
    endpoint = "completions"
    body = CompletionRequest
    prompt_param = "prompt"
    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    async def prompts(self, body: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
        return [
            Prompt(tuple(await tokenizer.encode(prompt)), prompt) if isinstance(prompt, str) else Prompt(tuple(prompt))
            for prompt in body.prompt
        ]

    def whole(self, body: CompletionRequest, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if body.logprobs is None else completion_logprobs(piece.tokens, tokenizer),
            "finish_reason": piece.finish_reason,
        }

    def chunk(
        self,
        body: CompletionRequest,
        piece: Piece,
        tokenizer: Tokenizer,
        *,
        first: bool,  # noqa: ARG002 - every chunk looks alike here
    ) -> dict[str, Any] | None:
        if not (piece.text or piece.finish_reason or (piece.tokens and body.logprobs is not None)):
            return None
        return self.whole(body, piece, tokenizer)


def completion_logprobs(tokens: tuple[ShownToken, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's four parallel lists. `text_offset` counts characters of this choice's text; `top_logprobs` always names the token itself
    too, so it may have one entry more than asked for. A prompt's first token has no log-probability: null."""
    return {
        "tokens": [tokenizer.token_label(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else json_logprob(token.logprob.logprob) for token in tokens],
        "top_logprobs": [_top(token, tokenizer) for token in tokens],
        "text_offset": [token.start for token in tokens],
    }


def _top(token: ShownToken, tokenizer: Tokenizer) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for token_id, logprob in (*token.logprob.top, (token.token_id, token.logprob.logprob)):
        top.setdefault(tokenizer.token_label(token_id), json_logprob(logprob))  # two ids with one name: the likelier stays
    return top


DIALECT = CompletionsDialect()


@router.post("/v1/completions", **described(Completion, 404, 507, body=CompletionRequest, events=Completion))
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    return await answer(request, DIALECT)
