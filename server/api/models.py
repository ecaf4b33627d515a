"""Models: every checkpoint and its variants, what each holds and costs, and making one resident or not."""

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request

from model_store.checkpoints import Checkpoint
from model_store.variants import Variant
from quantizers.errors import NotFound
from quantizers.recipe import Recipe, parse_recipe
from server.api.description import described
from server.api.objects import Memory, Model, ModelList, Unloaded
from server.api.services import Services, services_of
from server.engine.interface import ResidentInfo, VariantKey

router = APIRouter()


@router.get("/v1/models", **described(ModelList))
async def list_models(request: Request) -> dict[str, Any]:
    """The bare name of every checkpoint, then its variants: resident ones, artifacts, and the default precision."""
    services = services_of(request)
    checkpoints = await run_sync(services.store.checkpoints.list)
    variants = await run_sync(services.store.variants.list)
    return {"object": "list", "data": [entry for checkpoint in checkpoints for entry in _entries(services, checkpoint, variants)]}


@router.get("/v1/models/{model:path}", **described(Model, 404))
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """One model. A variant that could be made but was not is 404: the catalog lists what is there."""
    services = services_of(request)
    key = await services.catalog.resolve(model)
    checkpoint = await services.catalog.checkpoint(key.model)
    variants = await run_sync(services.store.variants.list, key.model)
    artifact = next((variant for variant in variants if variant.slug == key.precision), None)
    known = artifact is not None or key in services.engine.residents() or parse_recipe(key.precision).is_baseline
    if not known and "@" in model:
        there = ", ".join(["fp32", "bf16", "fp16", *(variant.slug for variant in variants)])
        raise NotFound(
            f"{model!r} was not made yet; {key.model} has {there}. A request to it, POST /v1/models/{model}/load or "
            "POST /v1/quantize/jobs makes it",
            param="model",
            code="model_not_found",
        )
    return _entry(services, model, checkpoint, key, artifact)


@router.post("/v1/models/{model:path}/load", **described(Model, 404, 507))
async def load_model(request: Request, model: str) -> dict[str, Any]:
    """Make a variant resident, quantizing it first where it has no artifact and that is allowed."""
    services = services_of(request)
    key = await services.catalog.resolve(model)
    await services.catalog.make_resident(key)
    return await get_model(request, model)


@router.post("/v1/models/{model:path}/unload", **described(Unloaded, 404))
async def unload_model(request: Request, model: str) -> dict[str, Any]:
    """Free what a resident variant holds. 404 where it is not resident."""
    services = services_of(request)
    key = await services.catalog.resolve(model)
    if key not in services.engine.residents():
        residents = ", ".join(map(str, services.engine.residents())) or "none"
        raise NotFound(f"{key} is not resident; resident are: {residents}", param="model", code="not_resident")
    await services.engine.unload(key)
    return {"id": str(key), "object": "model", "resident": False}


@router.get("/v1/memory", **described(Memory))
async def memory(request: Request) -> dict[str, Any]:
    """The ledger as the engine last reported it; `memory` is null before its first report."""
    stats = services_of(request).engine.stats()
    return {"object": "memory", "memory": None if stats is None else stats.memory.model_dump(mode="json")}


def _entries(services: Services, checkpoint: Checkpoint, variants: list[Variant]) -> list[dict[str, Any]]:
    artifacts = {variant.slug: variant for variant in variants if variant.checkpoint == checkpoint.name}
    residents = [key.precision for key in services.engine.residents() if key.model == checkpoint.name]
    default = services.settings.default_precision
    slugs = dict.fromkeys([default, *residents, *artifacts])
    keys = [VariantKey(model=checkpoint.name, precision=slug) for slug in slugs]
    bare = _entry(services, checkpoint.name, checkpoint, keys[0], artifacts.get(default))
    return [bare, *(_entry(services, str(key), checkpoint, key, artifacts.get(key.precision)) for key in keys)]


def _entry(services: Services, model: str, checkpoint: Checkpoint, key: VariantKey, artifact: Variant | None) -> dict[str, Any]:
    """OpenAI's fields, then ours. `bytes`: the artifact's, or for a baseline the checkpoint's; null for one that is not made yet."""
    recipe = parse_recipe(key.precision)
    stored = checkpoint.bytes if recipe.is_baseline else artifact and artifact.bytes
    return {
        "id": model,
        "object": "model",
        "created": int(checkpoint.created if artifact is None else artifact.created),
        "owned_by": "precis",
        "variant": str(key),
        "precision": key.precision,
        "method": _method(recipe),
        "scheme": recipe.scheme.model_dump(mode="json"),
        "activation_bits": getattr(recipe.scheme, "activation_bits", None),
        "bytes": stored,
        "report": None if artifact is None else artifact.report,
        **_residency(services.engine.residents().get(key)),
    }


def _method(recipe: Recipe) -> str | None:
    return "-".join(method.name for method in recipe.methods) or None


def _residency(info: ResidentInfo | None) -> dict[str, Any]:
    if info is None:
        return {"resident": False, "memory": None, "kernels": None}
    return {
        "resident": True,
        "device": info.device,
        "dtype": info.dtype,
        "kv_dtype": info.kv_dtype,
        "max_model_len": info.max_model_len,
        "memory": dict(info.bytes),
        "bytes_by_dtype": info.bytes_by_dtype,
        "predicted_bytes": info.predicted_bytes,
        "load_seconds": info.load_seconds,
        "kernels": info.kernels,
    }
