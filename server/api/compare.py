"""Variants side by side, by what was measured of them: the same data as `precis compare --json`."""

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request

from quantizers.errors import InvalidInput
from server.api.description import described
from server.api.objects import MeasuredSideBySide
from server.api.services import services_of
from server.comparison import compare

router = APIRouter()

MAX_MODELS = 64


_MODELS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_MODELS}
_QUERY = {"name": "model", "in": "query", "required": True, "schema": _MODELS}


@router.get("/v1/compare", **described(MeasuredSideBySide, 404, query=[_QUERY]))
async def compare_measured(request: Request) -> dict[str, Any]:
    """`?model=` is a checkpoint's name, for all of its measured variants, or is given once for each variant, `checkpoint@recipe`."""
    models = request.query_params.getlist("model")
    if not 1 <= len(models) <= MAX_MODELS:
        raise InvalidInput(f"{len(models)} values of model: give a checkpoint's name, or 1 to {MAX_MODELS} of its variants", param="model")
    found = await run_sync(compare, services_of(request).store, models)
    return {"object": "comparison", **found.model_dump(mode="json")}
