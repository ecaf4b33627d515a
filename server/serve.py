"""`precis serve`: makes ready what the command line names, then runs the HTTP server until it is told to stop. `precis batch`: runs the
same application over a file of requests, without a port.
"""

import asyncio
import subprocess
import sys
from pathlib import Path

import uvicorn

from model_store.store import Store
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.recipe import parse_recipe
from server.app import create_app
from server.batch import Summary, run_batch
from server.console import bar
from server.engine.client import EngineClient
from server.jobs import JobRunner
from server.settings import Settings
from server.sources import open_checkpoint, open_demo

_BATCH_QUEUE = 1 << 20


def serve(settings: Settings, models: list[str], *, demo: bool) -> None:
    """Blocks until SIGTERM or SIGINT. Raises what importing and quantizing raise, before anything listens."""
    store = Store(settings.data_dir, max_upload_bytes=settings.max_upload_bytes)
    names = _prepare(store, settings, models, demo)
    engine = EngineClient(settings)
    app = create_app(settings, store, engine, JobRunner(settings, store), preload=_variants(settings, names))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=int(settings.grace_seconds) or None,
        server_header=False,
    )
    _Server(config, names, settings).run()


def batch(settings: Settings, source: Path, target: Path) -> Summary:
    """Answer the requests of `source` into `target`. Raises InvalidInput where either file cannot be used."""
    if not source.is_file():
        raise InvalidInput(f"{source} is no file: give a file of requests, one JSON object a line", param="file")
    if target.resolve() == source.resolve() or not target.parent.is_dir():
        raise InvalidInput(f"{target} cannot be written: give another --output", param="output")
    # Nobody else asks this engine for anything: its queue may be as long as the batch makes it, and no key is needed.
    own = settings.model_copy(update={"max_waiting": _BATCH_QUEUE, "api_key": None, "api_keys": []})
    store = Store(settings.data_dir, max_upload_bytes=settings.max_upload_bytes)
    app = create_app(own, store, EngineClient(own), JobRunner(own, store))

    async def run() -> Summary:
        with bar(source.name) as share:
            async with app.router.lifespan_context(app):
                return await run_batch(app, source, target, lambda _, part: share("answering", part))

    return asyncio.run(run())


def _prepare(store: Store, settings: Settings, models: list[str], demo: bool) -> list[str]:
    """Import and quantize what is missing, in child processes: this one must not come to hold torch."""
    names = []
    for model in models:
        with bar(f"importing {model}") as share:
            names.append(open_checkpoint(store, model, share).name)
    if demo:
        with bar("importing the demo model") as share:
            names.insert(0, open_demo(store, share).name)
    for name in names:
        missing = [slug for slug in settings.recipes if not parse_recipe(slug).is_baseline and not store.variants.has(name, slug)]
        if missing:
            command = [sys.executable, "-m", "server.cli", "quantize", name, *missing]
            command += ["--data-dir", str(settings.data_dir), "--device", settings.device]
            if subprocess.run(command, check=False).returncode != 0:
                raise QuantizationFailed(f"{name} could not be quantized by {' '.join(missing)}; the reason stands above")
    return names


def _variants(settings: Settings, names: list[str]) -> list[str]:
    """Ids of the variants to load at start: the default precision of each named model, and its recipes."""
    slugs = dict.fromkeys([settings.default_precision, *settings.recipes])
    return [f"{name}@{slug}" for name in names for slug in slugs]


class _Server(uvicorn.Server):
    """uvicorn, which says what to try next once it listens."""

    def __init__(self, config: uvicorn.Config, names: list[str], settings: Settings) -> None:
        super().__init__(config)
        self._names, self._settings = names, settings

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if not self.started:
            return
        port = self.servers[0].sockets[0].getsockname()[1]
        base = f"http://{self._settings.host}:{port}"
        print(f"Precis listens on {base} (models: {', '.join(self._names) or 'none yet'})", flush=True)
        model = self._names[0] if self._names else "MODEL"
        body = f'{{"model": "{model}@rtn-w4g64", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
        print(f"try: curl {base}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)
