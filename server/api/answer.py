"""How a generation route answers, streaming and not; what differs between the routes is a Dialect.

Everything that a request can get wrong, and the engine's first event, come before the headers, so that errors have their status. An
error after that is an `error` event of the stream.
"""

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from quantizers.errors import InvalidInput, PrecisError
from server.api.body import json_body
from server.api.errors import error_body, status_of
from server.api.generation import Choice, Piece, Prompt, best, collect, merge, run_choice
from server.api.schema import INT64, GenerationRequest
from server.api.services import Services, services_of
from server.api.sse import DONE, ClientGone, EventStream, event, first_of, until_disconnect
from server.engine.interface import Request, ResidentInfo, Sampling, VariantKey
from server.metrics import Outcome, RequestMeter
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=GenerationRequest)


class Dialect(Protocol[Body]):
    """What one route has of its own: its body, how it makes prompts, and how its objects look."""

    endpoint: str  # the metrics' label
    body: type[Body]
    prompt_param: str  # the field that an over-long prompt is blamed on
    id_prefix: str
    whole_object: str
    chunk_object: str

    async def prompts(self, body: Body, tokenizer: Tokenizer) -> list[Prompt]: ...

    def whole(self, body: Body, piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
        """A finished choice."""
        ...

    def chunk(self, body: Body, piece: Piece, tokenizer: Tokenizer, *, first: bool) -> dict[str, Any] | None:
        """A choice in a chunk of the stream; None: nothing to send. `first` is the choice's first piece."""
        ...


@dataclass(frozen=True)
class Run(Generic[Body]):
    """A request that was found good: its variant is resident, its prompts fit."""

    dialect: Dialect[Body]
    body: Body
    key: VariantKey
    tokenizer: Tokenizer
    prompts: tuple[Prompt, ...]
    choices: tuple[Choice, ...]
    id: str
    created: int

    def envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": str(self.key)}

    def usage(self, newest: Iterable[Piece]) -> dict[str, Any]:
        """Tokens so far; a prompt counts once, however many choices continue it."""
        pieces = list(newest)
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(piece.completion_tokens for piece in pieces)
        first_choices = [piece for piece in pieces if piece.index % self.body.candidates == 0]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(piece.cached_tokens for piece in first_choices)},
        }


async def answer(http: HttpRequest, dialect: Dialect[Body]) -> Response:
    """The whole of a generation route. Raises the error tree, and ClientGone."""
    services = services_of(http)
    meter = RequestMeter(services.metrics, dialect.endpoint)
    try:
        body = await json_body(dialect.body)(http)
        return await until_disconnect(http, _respond(services, dialect, body, meter, _cache_salt(http, body)))
    except PrecisError as error:
        meter.finish("rejected" if status_of(error) < 500 else "error")
        raise
    except (asyncio.CancelledError, ClientGone):
        meter.finish("cancelled")
        raise
    except Exception:
        meter.finish("error")
        raise


def _cache_salt(http: HttpRequest, body: GenerationRequest) -> str:
    """Differs with the key that the request came with, and with its own `cache_salt`: what differs in it shares no cached prefix."""
    key = http.headers.get("Authorization", "").partition(" ")[2].strip()
    parts = hashlib.blake2b(key.encode(), digest_size=16).hexdigest(), body.cache_salt
    return "/".join(parts) if any((key, body.cache_salt)) else ""


async def _respond(services: Services, dialect: Dialect[Body], body: Body, meter: RequestMeter, cache_salt: str) -> Response:
    key = await services.catalog.resolve(body.model)
    meter.variant = key
    run = await _prepare(services, dialect, body, key, cache_salt)
    headers = {"X-Served-Precision": key.precision}
    pieces = merge([run_choice(services.engine, choice, run.tokenizer, meter) for choice in run.choices])
    first = await first_of(pieces)
    if body.stream:
        return EventStream(_stream(run, first, pieces, meter), headers)
    whole = await collect(_chain(first, pieces), len(run.choices))
    meter.finish(_outcome(whole))
    choices = [dialect.whole(body, piece, run.tokenizer) for piece in best(whole, body.candidates, body.n)]
    return JSONResponse({**run.envelope(dialect.whole_object), "choices": choices, "usage": run.usage(whole)}, headers=headers)


async def _prepare(services: Services, dialect: Dialect[Body], body: Body, key: VariantKey, cache_salt: str) -> Run[Body]:
    """Checks what depends on the model. The prompt is made before the model is loaded, so that a bad one loads nothing."""
    tokenizer = await services.catalog.tokenizer(key.model)
    prompts = await dialect.prompts(body, tokenizer)
    if any(not prompt.token_ids for prompt in prompts):
        raise InvalidInput("the prompt is empty: it needs at least one token", param=dialect.prompt_param)
    info = await services.catalog.make_resident(key)
    request_id = f"{dialect.id_prefix}-{uuid.uuid4().hex}"
    choices: list[Choice] = []
    for prompt in prompts:
        _check_tokens(body, prompt, info, dialect.prompt_param)
        limit = _token_limit(body, prompt, info, dialect.prompt_param)
        for nth in range(body.candidates):
            index = len(choices)
            sampling = _sampling(body, limit, nth, prompt.grammar, echo=body.echoes_prompt)
            request = Request(
                id=f"{request_id}-{index}",
                variant=key,
                prompt_token_ids=prompt.token_ids,
                sampling=sampling,
                cache_salt=cache_salt,
            )
            choices.append(Choice(index, request, prompt, tuple(body.stop), body.echoes_prompt))
    return Run(dialect, body, key, tokenizer, tuple(prompts), tuple(choices), request_id, int(time.time()))


def _check_tokens(body: GenerationRequest, prompt: Prompt, info: ResidentInfo, prompt_param: str) -> None:
    """Every token id of the request lies in the vocabulary."""
    for param, token_ids in ((prompt_param, prompt.token_ids), ("stop_token_ids", body.stop_token_ids), ("logit_bias", body.logit_bias)):
        outside = next((token_id for token_id in token_ids if token_id >= info.vocab_size), None)
        if outside is not None:
            raise InvalidInput(f"{param}: token id {outside} is outside the vocabulary: 0 to {info.vocab_size - 1}", param=param)


def _token_limit(body: GenerationRequest, prompt: Prompt, info: ResidentInfo, prompt_param: str) -> int:
    """Tokens to generate: what was asked for, which must fit, or what the context leaves (a default gives way)."""
    length, room = len(prompt.token_ids), info.max_model_len - len(prompt.token_ids)
    code = "context_length_exceeded"
    explicit = body.token_limit if body.model_fields_set & {"max_tokens", "max_completion_tokens"} else None
    if room < (0 if explicit == 0 else 1):
        raise InvalidInput(
            f"the prompt has {length} tokens, the context of {info.key} holds {info.max_model_len}: shorten the prompt",
            param=prompt_param,
            code=code,
        )
    if explicit is not None and explicit > room:
        param = "max_tokens" if "max_tokens" in body.model_fields_set else "max_completion_tokens"
        raise InvalidInput(
            f"the prompt's {length} tokens and {explicit} to generate do not fit the context of {info.max_model_len} of {info.key}: "
            f"shorten the prompt, or ask for at most {room}",
            param=param,
            code=code,
        )
    limit = room if body.token_limit is None else min(body.token_limit, room)
    if body.min_tokens > limit:
        raise InvalidInput(f"min_tokens is {body.min_tokens}, but at most {limit} tokens can follow this prompt", param="min_tokens")
    return limit


def _sampling(body: GenerationRequest, limit: int, nth: int, grammar: str | None, *, echo: bool) -> Sampling:
    """The engine's parameters of the nth choice of a prompt, whose seed is the request's plus n (wrapping in 64 bits)."""
    return Sampling(
        max_tokens=limit,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else (body.seed + nth + INT64) % (2 * INT64) - INT64,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=(body.top_logprob_count or 0) if body.candidates > body.n else body.top_logprob_count,  # the best are found by them
        prompt_logprobs=body.top_logprob_count if echo else None,
        grammar=grammar,
    )


async def _chain(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


def _outcome(newest: Iterable[Piece]) -> Outcome:
    return "length" if any(piece.finish_reason == "length" for piece in newest) else "stop"


async def _stream(run: Run[Body], first: Piece, rest: AsyncGenerator[Piece, None], meter: RequestMeter) -> AsyncGenerator[str, None]:
    """Events from the first piece to `[DONE]`, or to an `error` event. Closing it before its end cancels the request."""
    newest: dict[int, Piece] = {}
    pieces = _chain(first, rest)
    outcome: Outcome = "cancelled"
    try:
        async for piece in pieces:
            choice = run.dialect.chunk(run.body, piece, run.tokenizer, first=piece.index not in newest)
            newest[piece.index] = piece
            if choice is not None:
                yield event(_chunk(run, [choice], newest.values()))
        if run.body.usage_at_end:
            yield event({**run.envelope(run.dialect.chunk_object), "choices": [], "usage": run.usage(newest.values())})
        yield DONE
        outcome = _outcome(newest.values())
    except PrecisError as error:
        outcome = "error"
        yield event(error_body(error), name="error")
    except Exception:
        # The headers are out: the stream can only say so and end. The log has the traceback.
        logger.exception("the stream %s failed", run.id)
        outcome = "error"
        yield event(error_body(PrecisError("internal error: see the server's log", code="internal_error")), name="error")
    finally:
        meter.finish(outcome)
        await pieces.aclose()


def _chunk(run: Run[Body], choices: list[dict[str, Any]], newest: Iterable[Piece]) -> dict[str, Any]:
    chunk = {**run.envelope(run.dialect.chunk_object), "choices": choices}
    if run.body.usage_in_every_chunk:
        chunk["usage"] = run.usage(newest)
    elif run.body.usage_at_end:
        chunk["usage"] = None
    return chunk
