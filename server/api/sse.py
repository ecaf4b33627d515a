"""Server-sent events, and noticing at once that the client has gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import anyio
from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

Result = TypeVar("Result")

DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may collect events


class ClientGone(Exception):
    """The client closed its connection before the answer began; there is nobody to answer."""


def event(data: Any, *, name: str | None = None, event_id: int | None = None) -> str:
    """One event; `data` becomes one line of JSON."""
    lines = [] if event_id is None else [f"id: {event_id}"]
    lines += [] if name is None else [f"event: {name}"]
    lines.append("data: " + json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    return "\n".join(lines) + "\n\n"


class EventStream(StreamingResponse):
    """Sends what `source` yields; closes it when the client goes, wherever it stands, and lets its clean-up run to its end."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        super().__init__(source, headers={**HEADERS, **headers})
        self._source = source

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; cancels it and raises ClientGone when the client goes first. The request's body was read before."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def first_of(source: AsyncGenerator[Result, None]) -> Result:
    """The first item; closes `source` where there is none to be had, so that no error leaves it open."""
    try:
        return await anext(source)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await source.aclose()
        raise
