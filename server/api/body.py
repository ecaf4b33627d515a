"""A request's JSON body, read by hand: bounded while it arrives, strict JSON only, checked against a pydantic model.

FastAPI's own reading holds any size in memory, takes NaN and Infinity, and answers some malformed bodies with a 500.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from quantizers.errors import InvalidInput, TooLarge
from server.api.errors import invalid_input

DRAIN_FACTOR = 8  # a body up to this many times the limit is read to its end and dropped, so that its sender gets to read the answer
MAX_DEPTH = 64  # levels of nesting; the deepest request that means anything has five

Model = TypeVar("Model", bound=BaseModel)


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that gives the request's body as `model`. It raises InvalidInput or TooLarge."""

    async def read(request: Request) -> Model:
        raw = await read_bounded(request, request.app.state.services.settings.max_body_bytes)
        try:
            return model.model_validate(parse_object(raw))
        except ValidationError as error:
            raise invalid_input(error) from error

    return read


async def read_bounded(request: Request, limit: int) -> bytes:
    """The whole body in memory. Raises TooLarge above `limit` bytes."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > limit * DRAIN_FACTOR:
            break
    if size > limit:
        raise TooLarge(f"the body is larger than {limit} bytes: send less at once, or start the server with a larger max_body_bytes")
    return b"".join(chunks)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidInput for all else: other values, NaN, invalid UTF-8, half surrogates, endless nesting or digits."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidInput(f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json") from error
    except ValueError as error:  # malformed, or an integer of thousands of digits
        raise InvalidInput(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidInput("the body must be a JSON object, such as {...}", code="invalid_json")
    _check_depth(value)
    if b"\\u" in raw:
        _check_surrogates(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidInput(f"the field {twice!r} is given twice", param=twice[:80], code="invalid_json")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise InvalidInput(f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            "a string of the body holds half of a surrogate pair, which is no text: send whole characters", code="invalid_json"
        ) from error
