"""The HTTP application: routes, middleware and the lifetime of what stands behind them. Nothing here imports torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio.to_thread import run_sync
from fastapi import FastAPI

from model_store.store import Store
from server.api import chat, checkpoints, compare, completions, description, errors, jobs, middleware, models, ops, uploads
from server.api.catalog import Catalog
from server.api.services import Services
from server.engine.interface import Engine
from server.gauges import Gauges
from server.jobs import JobRunner
from server.metrics import Metrics
from server.settings import Settings

EXPIRY_SECONDS = 3600
ROUTERS = (completions.router, chat.router, models.router, compare.router, uploads.router, checkpoints.router, jobs.router, ops.router)


async def _expire_uploads(store: Store) -> None:
    """Drop uploads that nobody completed in their time, at the start and every hour."""
    while True:
        await run_sync(store.uploads.expire, time.time())
        await asyncio.sleep(EXPIRY_SECONDS)


def create_app(settings: Settings, store: Store, engine: Engine, job_runner: JobRunner, *, preload: Sequence[str] = ()) -> FastAPI:
    """The application over the given parts. Its lifespan starts and stops the engine and the job runner; the store stays the caller's.

    `preload` are model ids to make resident once it listens, one after the other; `/ready` answers 503 until all of them are.
    """
    metrics = Metrics()
    metrics.registry.register(Gauges(store, engine))
    services = Services(settings, store, engine, job_runner, Catalog(settings, store, engine, job_runner, metrics), metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            await job_runner.start()
            expiry = asyncio.create_task(_expire_uploads(store), name="upload expiry")
            try:
                services.catalog.preload(preload)
                yield
            finally:
                expiry.cancel()
                await services.catalog.stop()
                await job_runner.stop()
        finally:
            await engine.stop(settings.grace_seconds)

    # No interactive pages: they would load scripts from elsewhere. Slashes are not redirected: a redirect answers in no error's shape.
    app = FastAPI(title="Precis", version=version("precis"), lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    description.install(app)
    errors.install(app)
    app.add_middleware(middleware.Faults)
    if settings.keys:
        app.add_middleware(middleware.ApiKey, keys=settings.keys)
    app.add_middleware(middleware.RequestId)  # added last, so it is the outermost: refused requests have an id too
    return app
