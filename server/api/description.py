"""/openapi.json: what each route takes and gives, its errors included, beside what FastAPI finds out by itself.

A route says it with `described(...)` in its decorator. Bodies are read by hand (`server.api.body`), so their schemas are put in here.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.objects import Error

_REF = "#/components/schemas/{model}"
_REASONS = {
    400: "a value is wrong; `param` names it",
    401: "the API key is missing or wrong",
    404: "no such model, file, job or route",
    409: "the name or the state is taken",
    413: "more bytes than are allowed",
    500: "a fault of the server, or of what it was given to run",
    503: "the queue is full, the engine is not there, or a variant is not ready in time; `Retry-After` says when to come back",
    507: "the memory budget cannot hold it",
}
_EVERYWHERE = (400, 401, 500, 503)
_models: set[type[BaseModel]] = {Error}


def described(
    answer: type[BaseModel],
    *errors: int,
    body: type[BaseModel] | None = None,
    status: int = 200,
    events: type[BaseModel] | None = None,
    query: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Arguments of a route's decorator: `answer` comes with `status`, `errors` beside those that any route may answer.

    `events` is the data of a stream's events, where the answer may be one. `query` are parameters that the route reads by itself.
    """
    _models.update(model for model in (answer, body, events) if model is not None)
    content = {"application/json": {"schema": _ref(answer)}}
    if events is not None:
        what = f"Events whose data is {events.__name__}, then [DONE]."
        content["text/event-stream"] = {"schema": {"type": "string", "description": what}}
    extra: dict[str, Any] = {"parameters": list(query)} if query else {}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return {
        "status_code": status,
        "response_model": None,
        "responses": {status: {"description": _line(answer), "content": content}, **_errors(*errors, *((413,) if body else ()))},
        "openapi_extra": extra or None,
    }


def plain(media_type: str, description: str, *errors: int) -> dict[str, Any]:
    """The same for an answer that is no JSON."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {
        "response_model": None,
        "response_class": Response,
        "responses": {200: {"description": description, "content": content}, **_errors(*errors)},
    }


def _errors(*more: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ref(Error)}}
    return {status: {"description": _REASONS[status], "content": content} for status in sorted({*_EVERYWHERE, *more})}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _line(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0]


def install(app: FastAPI) -> None:
    """Make /openapi.json of the routes and of the models that they named."""
    routes = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = routes()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # errors of every kind have one shape here
            _, found = models_json_schema(
                [(model, "validation") for model in sorted(_models, key=lambda model: model.__name__)], by_alias=True, ref_template=_REF
            )
            schema["components"] = {
                "schemas": found["$defs"],
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            }
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
