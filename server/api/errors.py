"""Errors as HTTP: one table from error type to status, and one shape, `{"error": {"message", "type", "param", "code"}}`, for every answer
that is not a success: unknown routes, wrong methods and refused bodies included.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from quantizers import errors

logger = logging.getLogger(__name__)

# The nearest base class counts, so a new leaf of the tree has its parent's status until it is named here.
STATUS: dict[type[errors.PrecisError], int] = {
    errors.InvalidInput: 400,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.QuantizationFailed: 500,
    errors.CorruptData: 500,
    errors.OutOfMemory: 507,
    errors.Overloaded: 503,
    errors.EngineUnavailable: 503,
    errors.PrecisError: 500,
}
RESTART_SECONDS = 2  # about what a restart of the engine takes

_TYPE_OF_STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_CODE_OF_STATUS = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def status_of(error: errors.PrecisError) -> int:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_type(status: int) -> str:
    return _TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(error: errors.PrecisError) -> dict[str, Any]:
    """The answer's JSON; also what an `error` event of a stream carries."""
    return _body(status_of(error), error.message, error.param, error.code)


def error_response(error: errors.PrecisError) -> JSONResponse:
    status = status_of(error)
    return JSONResponse(error_body(error), status, headers={"Retry-After": str(_retry_after(error))} if status == 503 else None)


def _retry_after(error: errors.PrecisError) -> int:
    """Whole seconds: what the queue's rate says, rounded up, where it was the queue that refused."""
    seconds = error.retry_after_seconds if isinstance(error, errors.Overloaded) else None
    return RESTART_SECONDS if seconds is None else max(1, math.ceil(seconds))


def unauthorized_response() -> JSONResponse:
    message = "the header 'Authorization: Bearer <key>' is missing or holds a wrong key: send the key that the server was started with"
    return JSONResponse(_body(401, message, None, "invalid_api_key"), 401, headers={"WWW-Authenticate": "Bearer"})


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def param_path(location: Sequence[int | str]) -> str:
    """`("messages", 0, "content")` -> `messages.0.content`."""
    return ".".join(str(step) for step in location)


def invalid_input(error: ValidationError) -> errors.InvalidInput:
    """The first thing that pydantic found wrong, as one sentence that names the field and the value's kind."""
    first = error.errors(include_url=False)[0]
    param = param_path(first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return errors.InvalidInput(
            f"unknown field {param!r}: this server implements none of that name; check its spelling or remove it",
            param=param,
            code="unknown_field",
        )
    if first["type"] == "missing":
        return errors.InvalidInput(f"the field {param!r} is required", param=param, code="missing_field")
    reason = (
        first["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "should be")
        .replace("valid dictionary or instance of", "valid object, a")
    )
    contrast = f", not {describe(first['input'])}" if first["type"] != "value_error" else ""
    return errors.InvalidInput(f"{param or 'the body'}: {reason}{contrast}", param=param)


def describe(value: Any) -> str:
    """A value in a message: short ones as they are, long or nested ones by their kind only."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return repr(value)


async def _on_precis_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.PrecisError)
    if status_of(error) >= 500:
        logger.error("%s: %s", type(error).__name__, error.message)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route, no such method, a malformed request."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] = error.headers or {}
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path}: the routes are listed at /openapi.json"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path}: use {headers.get('Allow', 'another method')}"
    code = _CODE_OF_STATUS.get(error.status_code)
    return JSONResponse(_body(error.status_code, message, None, code), error.status_code, headers=dict(headers))


def fault_response(error: Exception) -> JSONResponse:
    """A fault of the server itself, which tells nothing of its inside."""
    return JSONResponse(_body(500, f"internal error ({type(error).__name__}): see the server's log", None, "internal_error"), 500)


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.PrecisError, _on_precis_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
