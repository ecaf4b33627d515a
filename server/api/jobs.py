"""Methods and quantization jobs."""

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from model_store.jobs import Job
from quantizers.calibration import SAMPLE_TOKENS, SAMPLES
from quantizers.errors import Conflict, InvalidInput, NotFound
from quantizers.methods import METHODS
from server.api.body import json_body
from server.api.catalog import recipe_of
from server.api.description import described, plain
from server.api.objects import JobList, MethodList
from server.api.services import Services, services_of
from server.api.sse import EventStream, event
from server.api.strict import ApiModel
from server.calibration import DEFAULT, MAX_LENGTH, MAX_SAMPLES, SELF, CalibrationOptions

router = APIRouter()

POLL_SECONDS = 15.0  # a comment line goes out this often, so that proxies keep a quiet stream open


class Calibrate(ApiModel):
    """source: `pydoc` (the server's default text), `self` (text that the model writes) or the id of an uploaded text or .jsonl file."""

    source: str = Field(default=DEFAULT, min_length=1, max_length=128)
    samples: int = Field(default=SAMPLES, ge=1, le=MAX_SAMPLES)
    length: int = Field(default=SAMPLE_TOKENS, ge=2, le=MAX_LENGTH)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    async def options(self, services: Services) -> CalibrationOptions:
        """Raises NotFound for a source that is no upload: a path is never taken over HTTP."""
        if self.source not in (DEFAULT, SELF):
            try:
                await run_sync(services.store.files.get, self.source)
            except NotFound as error:
                raise NotFound(
                    f"calibration.source {self.source[:80]!r} is neither {DEFAULT!r} nor {SELF!r} nor the id of an uploaded file",
                    param="calibration.source",
                ) from error
        return CalibrationOptions(**self.model_dump())


class CreateJob(ApiModel):
    model: str = Field(min_length=1, max_length=128)  # a checkpoint's name
    recipe: str = Field(min_length=1, max_length=64)
    calibration: Calibrate | None = None


@router.get("/v1/methods", **described(MethodList))
async def list_methods() -> dict[str, Any]:
    """Every method with the JSON schema of its options and their defaults."""
    return {"object": "list", "data": [_method(name) for name in sorted(METHODS)]}


@router.post("/v1/quantize/jobs", **described(Job, 404, 409, body=CreateJob, status=202))
async def create_job(request: Request, body: Annotated[CreateJob, Depends(json_body(CreateJob))]) -> Response:
    """202 and where to look. An open job for the same variant is given back instead of a second one; 409 where the variant exists."""
    services = services_of(request)
    recipe = recipe_of(body.recipe, "recipe")
    if recipe.is_baseline:
        raise InvalidInput(f"{body.recipe!r} needs no quantization: ask for {body.model}@{body.recipe} as it is", param="recipe")
    await services.catalog.checkpoint(body.model)
    if any(variant.slug == recipe.slug for variant in await run_sync(services.store.variants.list, body.model)):
        raise Conflict(f"{body.model}@{recipe.slug} exists already: it can be asked for", param="recipe")
    calibration = await body.calibration.options(services) if body.calibration else None
    job = await services.jobs.submit(body.model, recipe.slug, calibration)
    return JSONResponse(job.model_dump(mode="json"), 202, headers={"Location": f"/v1/quantize/jobs/{job.id}"})


@router.get("/v1/quantize/jobs", **described(JobList))
async def list_jobs(request: Request) -> dict[str, Any]:
    jobs = await run_sync(services_of(request).store.jobs.list)
    return {"object": "list", "data": [job.model_dump(mode="json") for job in jobs]}


@router.get("/v1/quantize/jobs/{job_id}", **described(Job, 404))
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    job = await run_sync(services_of(request).store.jobs.get, job_id)
    return job.model_dump(mode="json")


@router.post("/v1/quantize/jobs/{job_id}/cancel", **described(Job, 404, 409))
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """409 where it is over already."""
    services = services_of(request)
    await services.jobs.cancel(job_id)
    return await get_job(request, job_id)


@router.get("/v1/quantize/jobs/{job_id}/events", **plain("text/event-stream", "the job's events", 404))
async def job_events(request: Request, job_id: str) -> Response:
    """Every event of the job from its first, or after `Last-Event-ID`, as they come, until the job is over."""
    services = services_of(request)
    await run_sync(services.store.jobs.get, job_id)
    return EventStream(_events(services, job_id, _last_event_id(request)), {})


async def _events(services: Services, job_id: str, last: int) -> AsyncGenerator[str, None]:
    while True:
        # Asked before the events are read: a job that is over by then has all of its events written.
        is_over = (await run_sync(services.store.jobs.get, job_id)).is_over
        events = await run_sync(services.store.jobs.events_since, job_id, last)
        for each in events:
            last = each.id
            yield event({"created": each.created, **each.data}, name=str(each.data.get("state", "event")), event_id=each.id)
        if is_over:
            return
        if not events:
            yield ": waiting\n\n"
        await services.jobs.changed(job_id, last, POLL_SECONDS)


def _last_event_id(request: Request) -> int:
    text = request.headers.get("Last-Event-ID", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise InvalidInput(f"Last-Event-ID is {text[:80]!r}: send the id of the last event that arrived, or none", param="Last-Event-ID")
    return int(text)


def _method(name: str) -> dict[str, Any]:
    method = METHODS[name]
    return {
        "id": name,
        "object": "method",
        "summary": method.summary,
        "needs_calibration": method.needs_calibration,
        "schema": method.model_json_schema(),
        "defaults": method(name=name).model_dump(mode="json"),
    }
