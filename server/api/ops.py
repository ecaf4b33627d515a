"""For operators: is it alive, is it ready, which version, and the metrics."""

import platform
from importlib.metadata import version
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.description import described, plain
from server.api.objects import Health, Ready, Version
from server.api.services import services_of
from server.metrics import CONTENT_TYPE

router = APIRouter()

_READY = described(Ready, 404)
_READY["responses"][503] = {**_READY["responses"][200], "description": "not ready"}


@router.get("/health", **described(Health))
async def health() -> dict[str, str]:
    """200 while this process answers, whatever the engine does."""
    return {"status": "ok"}


@router.get("/ready", **_READY)
async def ready(request: Request, model: str | None = None) -> JSONResponse:
    """200 while the engine is up and all that was to be loaded at the start is (with `?model=`: that variant is), else 503."""
    services = services_of(request)
    alive = services.engine.alive
    residents = services.engine.residents() if alive else {}
    models = dict.fromkeys(services.catalog.awaited, False) | {str(key): True for key in residents}
    is_ready = alive and not services.catalog.awaited
    if model is not None:
        is_ready = models[model] = await services.catalog.resolve(model) in residents
    body: dict[str, Any] = {"ready": is_ready, "engine": alive, "models": models}
    return JSONResponse(body, 200 if is_ready else 503)


@router.get("/version", **described(Version))
async def get_version() -> dict[str, str]:
    return {"version": version("precis"), "python": platform.python_version()}


@router.get("/metrics", **plain("text/plain", "samples in Prometheus' text format"))
async def metrics(request: Request) -> Response:
    """Prometheus' text format, written in a thread, because gauges of jobs and variants read the store."""
    return Response(await run_sync(services_of(request).metrics.exposition), media_type=CONTENT_TYPE)
