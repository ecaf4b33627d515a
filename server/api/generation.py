"""One or several sequences of a request, from engine events to pieces of text; both generation routes are made of these pieces."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

import anyio

from quantizers.errors import EngineUnavailable
from server.engine.interface import Engine, Finished, Request, Started, Token, TokenLogprob
from server.metrics import RequestMeter
from server.text.continuation import Continuation, Shown
from server.text.tokenizer import Tokenizer
from server.text.tools import CallDelta, ToolFormat, ToolParser

LEAST_LOGPROB = -9999.0  # what OpenAI sends for an impossible token: JSON has no infinity
CHOICES_AT_ONCE = 32  # of one request in the engine: what a step holds; the rest of many prompts waits here, not in everybody's queue
QUEUED_PIECES = 64  # of all choices together; a slow reader holds the engine's events back rather than in memory


@dataclass(frozen=True)
class Prompt:
    """`text` is what the ids were made from, where they were; `grammar` is what the continuation must follow, if anything; `tools` is
    how calls are written in it, where it may hold any, of which one only counts with `single_call`."""

    token_ids: tuple[int, ...]
    text: str | None = None
    grammar: str | None = None
    tools: ToolFormat | None = None
    single_call: bool = False


@dataclass(frozen=True)
class ShownToken:
    """A token whose text is out; `start` is where it begins in the choice's text, in characters. The first prompt token has no logprob."""

    token_id: int
    logprob: TokenLogprob | None
    start: int


def json_logprob(logprob: float) -> float:
    """A log-probability as JSON can carry it."""
    return max(logprob, LEAST_LOGPROB)


@dataclass(frozen=True)
class Piece:
    """More of choice `index`. `finish_reason` stands on its last piece; the counts are of the choice so far."""

    index: int
    text: str = ""
    tokens: tuple[ShownToken, ...] = ()
    calls: tuple[CallDelta, ...] = ()
    finish_reason: str | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0

    def followed_by(self, other: "Piece") -> "Piece":
        return replace(other, text=self.text + other.text, tokens=self.tokens + other.tokens, calls=self.calls + other.calls)


@dataclass(frozen=True)
class Choice:
    """What to run for one choice of the answer. `echo` begins its text with the prompt."""

    index: int
    request: Request
    prompt: Prompt
    stops: tuple[str, ...]
    echo: bool


async def run_choice(engine: Engine, choice: Choice, tokenizer: Tokenizer, meter: RequestMeter) -> AsyncGenerator[Piece, None]:
    """Pieces of one choice: the first as soon as the engine has accepted it, the last with its finish reason.

    Closing it cancels the request in the engine. Raises the engine's errors.
    """
    sampling, tools = choice.request.sampling, choice.prompt.tools
    detokenizer = tokenizer.detokenizer(choice.prompt.token_ids, shown=None if tools is None else tools.opening)
    text = Continuation(detokenizer, choice.stops, sampling.min_tokens)
    calls = None if tools is None else ToolParser(tools, single=choice.prompt.single_call)
    offset = 0  # of the continuation in the choice's text: the echoed prompt's length
    events = cast(AsyncGenerator[Started | Token | Finished, None], engine.generate(choice.request))
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Started):
                meter.started(event.prompt_tokens)
                opening = _echo(choice, tokenizer, event) if choice.echo else Piece(choice.index)
                offset = len(opening.text)
                yield opening
            elif isinstance(event, Token):
                meter.token(choice.index, event.together)
                shown = text.add(event)
                piece = _with_calls(_piece(choice.index, shown, offset, text.token_count), calls)
                if text.stopped or (calls is not None and calls.complete):
                    meter.sequence(0, text.token_count)
                    yield _ended(piece, calls, "stop")
                    return
                if piece.text or piece.tokens or piece.calls:
                    yield piece
            else:
                if event.reason == "cancelled":
                    raise EngineUnavailable(
                        "the engine cancelled the request, because its variant was unloaded or the server stops: try again"
                    )
                meter.sequence(event.cached_tokens, event.completion_tokens)
                last = _with_calls(_piece(choice.index, text.finish(), offset, event.completion_tokens), calls)
                last = _ended(last, calls, "stop" if text.stopped else event.reason)
                yield replace(last, cached_tokens=event.cached_tokens)
                return
    raise EngineUnavailable("the engine ended the request without a word: try again")


def _piece(index: int, shown: Shown, offset: int, count: int) -> Piece:
    tokens = tuple(ShownToken(placed.token.token_id, placed.token.logprob, offset + placed.start) for placed in shown.tokens)
    return Piece(index, shown.text, tokens, completion_tokens=count)


def _with_calls(piece: Piece, calls: ToolParser | None) -> Piece:
    """`piece`, its text without the calls in it."""
    if calls is None or not piece.text:
        return piece
    parsed = calls.add(piece.text)
    return replace(piece, text=parsed.text, calls=parsed.calls)


def _ended(piece: Piece, calls: ToolParser | None, reason: str) -> Piece:
    """`piece` as a choice's last."""
    if calls is not None:
        parsed = calls.finish()
        piece = replace(piece, text=piece.text + parsed.text, calls=piece.calls + parsed.calls)
        if calls.calls and reason == "stop":
            reason = "tool_calls"
    return replace(piece, finish_reason=reason)


def _echo(choice: Choice, tokenizer: Tokenizer, started: Started) -> Piece:
    """The prompt's text and tokens as the beginning of the choice."""
    token_ids = choice.prompt.token_ids
    text, starts = tokenizer.place(token_ids, choice.prompt.text)
    logprobs: Sequence[TokenLogprob | None] = started.prompt_logprobs or [None] * len(token_ids)
    tokens = tuple(ShownToken(*placed) for placed in zip(token_ids, logprobs, starts, strict=True))
    return Piece(choice.index, text, tokens)


def best(pieces: Sequence[Piece], candidates: int, n: int) -> list[Piece]:
    """Of every `candidates` whole choices of one prompt, the `n` of the highest mean log-probability a token, best first and numbered
    anew. Tokens of an echoed prompt are the same in all of them and count alike."""
    if candidates == n:
        return list(pieces)
    groups = [pieces[first : first + candidates] for first in range(0, len(pieces), candidates)]
    chosen = [piece for group in groups for piece in sorted(group, key=_mean_logprob, reverse=True)[:n]]
    return [replace(piece, index=index) for index, piece in enumerate(chosen)]


def _mean_logprob(piece: Piece) -> float:
    logprobs = [token.logprob.logprob for token in piece.tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else LEAST_LOGPROB


async def merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come, CHOICES_AT_ONCE of them; the first error ends all of them, and so does closing this."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(QUEUED_PIECES)
    turns = asyncio.Semaphore(CHOICES_AT_ONCE)
    tasks = [asyncio.create_task(_pump(source, queue, turns)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    source: AsyncGenerator[Piece, None], queue: "asyncio.Queue[Piece | BaseException | None]", turns: asyncio.Semaphore
) -> None:
    async with aclosing(source), turns:
        try:
            async for piece in source:
                await queue.put(piece)
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
            await queue.put(error)
        else:
            await queue.put(None)


async def collect(pieces: AsyncIterator[Piece], count: int) -> list[Piece]:
    """All choices whole, in order of their index."""
    whole = [Piece(index) for index in range(count)]
    async for piece in pieces:
        whole[piece.index] = whole[piece.index].followed_by(piece)
    return whole
