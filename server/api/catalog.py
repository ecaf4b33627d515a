"""From a model id to a resident variant: which checkpoint and recipe it names, whether that exists, and making it ready to answer."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from anyio.to_thread import run_sync

from model_store.checkpoints import Checkpoint
from model_store.store import Store
from quantizers.errors import InvalidInput, NotFound, Overloaded, PrecisError, QuantizationFailed
from quantizers.recipe import Recipe, parse_recipe
from server.engine.interface import Engine, ResidentInfo, VariantKey, VariantSpec
from server.jobs import JobRunner
from server.metrics import Metrics
from server.settings import Settings
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Catalog:
    """Model ids are `name` (the default precision) or `name@slug`."""

    def __init__(self, settings: Settings, store: Store, engine: Engine, jobs: JobRunner, metrics: Metrics) -> None:
        self._settings, self._store, self._engine, self._jobs, self._metrics = settings, store, engine, jobs, metrics
        self._loading: dict[VariantKey, asyncio.Task[ResidentInfo]] = {}
        self._preloading: asyncio.Task[None] | None = None
        self.awaited: set[str] = set()  # preloads that are not resident yet; one that failed stays until a later load succeeds
        self._tokenizers: dict[str, tuple[str, asyncio.Task[Tokenizer]]] = {}  # checkpoint -> (digest, tokenizer)

    async def resolve(self, model: str) -> VariantKey:
        """The variant that `model` names: resident, an artifact, a baseline, or one that may be quantized on load.

        Raises NotFound (code `model_not_found`) for an unknown checkpoint or a variant that may not be made, UnknownRecipe or
        UnsupportedScheme for a slug that is none.
        """
        name, _, slug = model.partition("@")
        await self.checkpoint(name, model)
        if "@" not in model:
            slug = self._settings.default_precision
        recipe = recipe_of(slug, "model")
        key = VariantKey(model=name, precision=recipe.slug)
        if recipe.is_baseline or key in self._engine.residents() or self._settings.on_load or await self.has_artifact(key):
            return key
        raise NotFound(await self._missing(key), param="model", code="model_not_found")

    async def checkpoint(self, name: str, model: str | None = None) -> Checkpoint:
        """The checkpoint under `name`. Raises NotFound, naming those that exist, also for what can be no name."""
        try:
            return await run_sync(self._store.checkpoints.get, name)
        except (NotFound, InvalidInput) as error:
            known = ", ".join(checkpoint.name for checkpoint in await run_sync(self._store.checkpoints.list)) or "none yet"
            raise NotFound(
                f"there is no model {(model or name)[:80]!r}: the checkpoints here are {known}; "
                "a model is a checkpoint's name, alone or with @ and a recipe. GET /v1/models lists them, POST /v1/checkpoints adds one",
                param="model",
                code="model_not_found",
            ) from error

    async def has_artifact(self, key: VariantKey) -> bool:
        return await run_sync(self._store.variants.has, key.model, key.precision)

    async def make_resident(self, key: VariantKey) -> ResidentInfo:
        """The resident variant, after quantizing and loading it where needed. All who ask for one variant share the work.

        Raises Overloaded after `load_timeout_seconds` (the work goes on), QuantizationFailed, and the engine's errors.
        """
        if key in self._engine.residents():
            return self._engine.residents()[key]
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.create_task(self._make_resident(key), name=f"load {key}")
            task.add_done_callback(lambda done: self._loaded(key, done))
        try:
            async with asyncio.timeout(self._settings.load_timeout_seconds):
                return await asyncio.shield(task)
        except TimeoutError as error:
            raise Overloaded(
                f"{key} is still being made ready after {self._settings.load_timeout_seconds:g} s; it goes on: try again later, "
                "and see GET /v1/quantize/jobs"
            ) from error

    def preload(self, models: Sequence[str]) -> None:
        """Begin to make these resident, one after the other. A failure is logged and does not keep the rest from loading."""
        self.awaited = set(models)
        self._preloading = asyncio.create_task(self._preload(models), name="preload")

    async def tokenizer(self, name: str) -> Tokenizer:
        """The checkpoint's tokenizer, read once, in a thread (about 0.3 s)."""
        checkpoint = await self.checkpoint(name)
        digest, task = self._tokenizers.get(name, ("", None))
        if task is None or digest != checkpoint.digest or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(run_sync(Tokenizer, checkpoint.dir), name=f"tokenizer {name}")
            self._tokenizers[name] = (checkpoint.digest, task)
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Cancel the loads under way."""
        preloading = [] if self._preloading is None else [self._preloading]
        tasks: list[asyncio.Task[Any]] = [*preloading, *self._loading.values(), *(task for _, task in self._tokenizers.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _preload(self, models: Sequence[str]) -> None:
        for model in models:
            try:
                await self.make_resident(await self.resolve(model))
            except PrecisError as error:
                logger.error("%s could not be loaded at start: %s", model, error.message)

    async def _make_resident(self, key: VariantKey) -> ResidentInfo:
        begun = time.perf_counter()
        checkpoint = await self.checkpoint(key.model)
        artifact_dir, source = None, "artifact"
        if not parse_recipe(key.precision).is_baseline:
            if not await self.has_artifact(key):
                await self._quantize(key)
                source = "quantize_on_load"
            variant = await run_sync(self._store.variants.get, key.model, key.precision)
            artifact_dir = str(variant.dir)
        info = await self._engine.load(VariantSpec(key=key, checkpoint_dir=str(checkpoint.dir), artifact_dir=artifact_dir))
        self._metrics.load_duration.labels(key.model, key.precision, source).observe(time.perf_counter() - begun)
        if self._settings.twin_precision is not None and self._settings.speculation != "off":
            await self._load_twin(key, self._settings.twin_precision)
        self.awaited -= {str(key), key.model} if key.precision == self._settings.default_precision else {str(key)}
        return info

    async def _load_twin(self, key: VariantKey, precision: str) -> None:
        """Make the variant that drafts for `key` resident. A failure is logged: drafts make an answer faster and never another one."""
        twin = VariantKey(model=key.model, precision=parse_recipe(precision).slug)
        if twin == key or twin in self._engine.residents():
            return
        try:
            await self.make_resident(twin)
        except PrecisError as error:
            logger.warning("%s answers without the drafts of %s: %s", key, twin, error.message)

    async def _quantize(self, key: VariantKey) -> None:
        """Make the artifact. Raises NotFound where that is not allowed, QuantizationFailed where it fails."""
        if not self._settings.on_load:
            raise NotFound(await self._missing(key), param="model", code="model_not_found")
        job = await self._jobs.submit(key.model, key.precision)
        job = await self._jobs.wait(job.id)
        if job.state != "succeeded":
            reason = job.error.message if job.error else f"the job was {job.state}"
            raise QuantizationFailed(f"{key} could not be made: {reason} (GET /v1/quantize/jobs/{job.id})")

    async def _missing(self, key: VariantKey) -> str:
        there = [variant.slug for variant in await run_sync(self._store.variants.list, key.model)]
        return (
            f"{key.model!r} has no variant {key.precision!r}, and this server quantizes nothing on load: there are fp32, bf16, fp16"
            f"{''.join(f', {slug}' for slug in there)}; make it with POST /v1/quantize/jobs"
        )

    def _loaded(self, key: VariantKey, task: "asyncio.Task[ResidentInfo]") -> None:
        """Forget the finished load, so that the next request tries anew; report a failure even when nobody waits any more."""
        self._loading.pop(key, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            text = error.message if isinstance(error, PrecisError) else repr(error)
            logger.warning("%s did not become resident: %s", key, text)


def recipe_of(slug: str, param: str) -> Recipe:
    """`parse_recipe`, whose error names `param`. Raises UnknownRecipe or UnsupportedScheme."""
    try:
        return parse_recipe(slug)
    except InvalidInput as error:
        raise type(error)(error.message, param=param, code=error.code) from error
