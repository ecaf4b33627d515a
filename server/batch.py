"""Many requests from a file, in OpenAI's batch lines: in order, resumable, as many at once as the engine has use for.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out  {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

Every line of the input has its line of the output, at the same place, whatever is wrong with it. Requests go to the application itself,
without a socket, so that an answer is the one that the server gives.
"""

import asyncio
import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field, ValidationError
from starlette.types import ASGIApp, Message, Scope

from quantizers.errors import InvalidInput, PrecisError
from server.api.body import parse_object
from server.api.errors import error_body, invalid_input
from server.api.strict import ApiModel

URLS = ("/v1/completions", "/v1/chat/completions")
AT_ONCE = 64  # twice what a step holds, so that a sequence that ends is followed by one that waits
_MAX_LINE = 10 << 20  # bytes, as of a request's body
_TRIES = 100  # of a request that the server has no room for, each after as long as the server says


class BatchLine(ApiModel):
    """A request of the file."""

    custom_id: str = Field(min_length=1, max_length=512)
    method: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Lines of a batch by what became of them; `resumed` were answered before."""

    succeeded: int
    failed: int
    resumed: int


async def call(app: ASGIApp, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """POST `body` to `path` of `app` without a socket: status, headers by lower-case name, body."""
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, received, chunks = 0, dict[str, str](), list[bytes]()

    async def receive() -> Message:
        for message in requests:
            return message
        await asyncio.Event().wait()  # the client stays until it has its answer
        raise AssertionError("nothing sets that event")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            received.update({name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]})
        else:
            chunks.append(message.get("body", b""))

    given = {"content-type": "application/json", **headers}
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given.items()],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return status, received, b"".join(chunks)


async def answer(app: ASGIApp, raw: bytes, seen: set[str], headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The output line of the input line `raw`. `seen` are the custom_ids so far; this one's is added."""
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None, "response": None, "error": None}
    try:
        if len(raw) > _MAX_LINE:
            raise InvalidInput(f"the line has {len(raw)} bytes, of which at most {_MAX_LINE} are allowed", code="line_too_long")
        try:
            fields = parse_object(raw)
            line["custom_id"] = fields["custom_id"] if isinstance(fields.get("custom_id"), str) else None
            request = BatchLine.model_validate(fields)
        except ValidationError as error:
            raise invalid_input(error) from error
        _check(request, seen)
    except InvalidInput as error:
        shape = error_body(error)["error"]
        return {**line, "error": {key: shape[key] for key in ("code", "message", "param")}}
    body = json.dumps(request.body).encode()
    for _ in range(_TRIES):
        status, received, answered = await call(app, request.url, body, headers or {})
        if status != 503 or "retry-after" not in received:
            break
        await asyncio.sleep(float(received["retry-after"]))
    response = {"status_code": status, "request_id": received.get("x-request-id"), "body": json.loads(answered)}
    return {**line, "response": response}


def _check(request: BatchLine, seen: set[str]) -> None:
    if request.custom_id in seen:
        raise InvalidInput(f"custom_id {request.custom_id!r} stands on an earlier line", param="custom_id", code="duplicate_custom_id")
    seen.add(request.custom_id)
    if request.method != "POST" or request.url not in URLS:
        raise InvalidInput(f"{request.method} {request.url} cannot be batched: only POST to {' or '.join(URLS)} can", param="url")
    if request.body.get("stream"):
        raise InvalidInput("an answer in a batch is whole: leave stream out", param="body.stream")


async def run_batch(
    app: ASGIApp,
    source: Path,
    target: Path,
    progress: Callable[[int, float], None],
    *,
    at_once: int = AT_ONCE,
    headers: dict[str, str] | None = None,
) -> Summary:
    """Answer every line of `source` into `target`, going on where an earlier run stopped. `progress`: lines done, share of the file.

    Raises InvalidInput where `target` holds answers to other lines.
    """
    size = max(1, source.stat().st_size)
    seen: set[str] = set()
    failed = resumed = done = 0
    with source.open("rb") as lines, target.open("a+b") as answers:
        resumed = _resume(lines, answers, source, target, seen)
        done = resumed
        running: deque[tuple[asyncio.Task[dict[str, Any]], int]] = deque()  # in the input's order
        try:
            for raw in _bounded_lines(lines):
                running.append((asyncio.create_task(answer(app, raw, seen, headers)), lines.tell()))
                while len(running) == at_once:
                    failed, done = failed + await _write(answers, *running.popleft(), done, size, progress), done + 1
            while running:
                failed, done = failed + await _write(answers, *running.popleft(), done, size, progress), done + 1
        finally:
            for task, _ in running:
                task.cancel()
            await asyncio.gather(*(task for task, _ in running), return_exceptions=True)
        os.fsync(answers.fileno())
    return Summary(done - resumed - failed, failed, resumed)


async def _write(
    answers: BinaryIO, task: "asyncio.Task[dict[str, Any]]", position: int, done: int, size: int, progress: Callable[[int, float], None]
) -> bool:
    """Write the next answer; returns whether it is a failure."""
    line = await task
    answers.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    answers.flush()  # whole lines only: what is interrupted here goes on behind the last of them
    progress(done + 1, position / size)
    return line["error"] is not None or line["response"]["status_code"] != 200


def _bounded_lines(lines: BinaryIO) -> Iterator[bytes]:
    """Lines that are not blank; of one that is too long, as much as shows that."""
    while raw := lines.readline(_MAX_LINE + 2):
        whole = raw
        while not whole.endswith(b"\n") and (whole := lines.readline(1 << 20)):
            pass
        if raw.strip():
            yield raw.strip()


def _resume(lines: BinaryIO, answers: BinaryIO, source: Path, target: Path, seen: set[str]) -> int:
    """Cut off a line that was not written to its end, and skip the lines that have their answers; returns how many those are."""
    answers.seek(0)
    count, end = 0, 0
    remaining = _bounded_lines(lines)
    for line in answers:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        count += 1
        raw = next(remaining, None)
        if raw is None or _custom_id(raw) != _custom_id(line):
            raise InvalidInput(
                f"{target} line {count} does not answer line {count} of {source}: give another --output, or remove that file",
                param="output",
            )
        seen.add(_custom_id(raw) or "")
    answers.truncate(end)
    answers.seek(0, os.SEEK_END)
    return count


def _custom_id(raw: bytes) -> str | None:
    try:
        found = parse_object(raw).get("custom_id")
    except PrecisError:
        return None
    return found if isinstance(found, str) else None
