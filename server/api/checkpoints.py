"""Checkpoints: uploaded files, a folder of this machine or a model of the hub become a named model, and are quantized where asked."""

from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator

from model_store.checkpoints import Checkpoint
from quantizers.errors import Conflict, InvalidInput
from server.api.body import json_body
from server.api.catalog import recipe_of
from server.api.description import described
from server.api.jobs import Calibrate
from server.api.objects import CheckpointEntry, CheckpointList, CreatedCheckpoint, Deleted
from server.api.services import Services, services_of
from server.api.strict import ApiModel

router = APIRouter()

SOURCES = ("files", "path", "hub")


class CreateCheckpoint(ApiModel):
    """Exactly one source. `quantize`: recipes for which jobs start once the checkpoint is there; `calibration`: for those of them that
    look at tokens, of which there must be one.
    """

    name: str = Field(min_length=1, max_length=128)
    files: list[Annotated[str, Field(max_length=128)]] | None = Field(default=None, min_length=1, max_length=1000)
    path: str | None = Field(default=None, min_length=1, max_length=4096)
    hub: str | None = Field(default=None, min_length=1, max_length=256)
    revision: str | None = Field(default=None, min_length=1, max_length=256)
    quantize: list[Annotated[str, Field(max_length=64)]] = Field(default=[], max_length=32)
    calibration: Calibrate | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "CreateCheckpoint":
        given = [source for source in SOURCES if getattr(self, source) is not None]
        if len(given) != 1:
            raise InvalidInput(
                "name exactly one source: 'files' (ids of completed uploads), 'path' (under an allowed root) or 'hub' (a model's id)"
                + (f"; given are {' and '.join(given)}" if given else ""),
                param=given[1] if given else "files",
            )
        if self.revision is not None and self.hub is None:
            raise InvalidInput("revision belongs to 'hub'", param="revision")
        return self


@router.post("/v1/checkpoints", **described(CreatedCheckpoint, 404, 409, body=CreateCheckpoint, status=201))
async def create_checkpoint(request: Request, body: Annotated[CreateCheckpoint, Depends(json_body(CreateCheckpoint))]) -> Response:
    """201 with the checkpoint and the jobs that were started; it can be asked for at once."""
    services = services_of(request)
    for slug in body.quantize:
        if recipe_of(slug, "quantize").is_baseline:
            raise InvalidInput(f"{slug!r} needs no quantization: ask for {body.name}@{slug} as it is", param="quantize")
    calibrated = [slug for slug in body.quantize if recipe_of(slug, "quantize").needs_calibration]
    if body.calibration is not None and not calibrated:
        raise InvalidInput("none of the recipes in quantize looks at calibration tokens: leave calibration out", param="calibration")
    options = await body.calibration.options(services) if body.calibration else None
    checkpoint = await _import(services, body)
    jobs = [
        await services.jobs.submit(checkpoint.name, slug, options if slug in calibrated else None) for slug in dict.fromkeys(body.quantize)
    ]
    entry = {**_entry(checkpoint), "jobs": [job.model_dump(mode="json") for job in jobs]}
    return JSONResponse(entry, 201, headers={"Location": f"/v1/checkpoints/{checkpoint.name}"})


@router.get("/v1/checkpoints", **described(CheckpointList))
async def list_checkpoints(request: Request) -> dict[str, Any]:
    checkpoints = await run_sync(services_of(request).store.checkpoints.list)
    return {"object": "list", "data": [_entry(checkpoint) for checkpoint in checkpoints]}


@router.get("/v1/checkpoints/{name}", **described(CheckpointEntry, 404))
async def get_checkpoint(request: Request, name: str) -> dict[str, Any]:
    return _entry(await services_of(request).catalog.checkpoint(name))


@router.delete("/v1/checkpoints/{name}", **described(Deleted, 404, 409))
async def delete_checkpoint(request: Request, name: str) -> dict[str, Any]:
    """Its variants answer no more. 409 while one of them is resident."""
    services = services_of(request)
    await services.catalog.checkpoint(name)
    residents = [str(key) for key in services.engine.residents() if key.model == name]
    if residents:
        raise Conflict(f"{name} is in use: unload {', '.join(residents)} first", param="name")
    await run_sync(services.store.checkpoints.delete, name)
    return {"id": name, "object": "checkpoint", "deleted": True}


async def _import(services: Services, body: CreateCheckpoint) -> Checkpoint:
    """Blocks a thread for as long as it takes, tens of seconds for a GGUF file. The store's errors name what is wrong."""
    store = services.store
    if body.files is not None:
        return await run_sync(store.checkpoints.import_files, body.name, await run_sync(_files, services, body.files))
    if body.path is not None:
        path = await run_sync(allowed_path, body.path, services.settings.allowed_roots)
        importer = store.checkpoints.import_folder if await run_sync(path.is_dir) else store.checkpoints.import_gguf
        return await run_sync(importer, body.name, path)
    assert body.hub is not None
    if not services.settings.allow_hub:
        raise InvalidInput("this server imports nothing from the hub: start it with allow_hub, or upload the files", param="hub")
    return await run_sync(store.checkpoints.import_hub, body.name, body.hub, body.revision)


def _files(services: Services, file_ids: list[str]) -> dict[str, Path]:
    """Uploaded files by the names under which they were uploaded."""
    files: dict[str, Path] = {}
    for file_id in file_ids:
        filename = services.store.files.get(file_id).filename
        if filename in files:
            raise InvalidInput(f"two of the files are named {filename!r}: a checkpoint has each name once", param="files")
        files[filename] = services.store.files.path(file_id)
    return files


def allowed_path(text: str, roots: list[Path]) -> Path:
    """`text` as a real path. Raises InvalidInput unless it lies under an allowed root after all links are followed.

    The message is the same for what is missing and what is forbidden, so that nobody maps the disk with it.
    """
    if not roots:
        raise InvalidInput("this server imports no paths: start it with allowed_roots, or upload the files", param="path")
    refused = InvalidInput(f"{text[:200]!r} is no file or folder under an allowed root", param="path")
    if "\0" in text:
        raise refused
    try:
        path = Path(text).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise refused from error
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        raise refused
    return path


def _entry(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest, without where it lies on the disk."""
    facts = checkpoint.model_dump(mode="json", exclude={"dir", "created"})
    return {"id": checkpoint.name, "object": "checkpoint", "created": int(checkpoint.created), "bytes": checkpoint.bytes, **facts}
