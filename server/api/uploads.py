"""OpenAI's Uploads and Files: large files in parts, straight to the disk, resumable by asking which parts arrived."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.requests import ClientDisconnect

from model_store.files import File
from model_store.uploads import Part, Upload
from server.api.body import json_body
from server.api.description import described
from server.api.multipart import stream_field
from server.api.objects import Deleted, UploadWithParts
from server.api.services import services_of
from server.api.sse import ClientGone
from server.api.strict import ApiModel
from server.metrics import Metrics

router = APIRouter()

_FORM = {"type": "object", "properties": {"data": {"type": "string", "format": "binary"}}, "required": ["data"]}
_PART = described(Part, 404, 409, 413)
_PART["openapi_extra"] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


class CreateUpload(ApiModel):
    """`mime_type` and `purpose` are kept and given back; what a file is, its content says."""

    bytes: int = Field(ge=1, lt=1 << 63)
    filename: str = Field(min_length=1, max_length=255)
    mime_type: str = Field(default="application/octet-stream", max_length=255)
    purpose: str = Field(default="user_data", max_length=64)


class CompleteUpload(ApiModel):
    part_ids: list[Annotated[str, Field(max_length=128)]] = Field(min_length=1, max_length=100_000)
    md5: str | None = Field(default=None, pattern="^[0-9a-fA-F]{32}$")


@router.post("/v1/uploads", **described(Upload, body=CreateUpload))
async def create_upload(request: Request, body: Annotated[CreateUpload, Depends(json_body(CreateUpload))]) -> dict[str, Any]:
    """Announce a file of `bytes` bytes."""
    store = services_of(request).store
    upload = await run_sync(store.uploads.create, body.filename, body.bytes, body.mime_type, body.purpose)
    return upload.model_dump(mode="json")


@router.get("/v1/uploads/{upload_id}", **described(UploadWithParts, 404))
async def get_upload(request: Request, upload_id: str) -> dict[str, Any]:
    """The upload and the parts that arrived whole, in order of arrival, for a client that resumes."""
    store = services_of(request).store
    upload = await run_sync(store.uploads.get, upload_id)
    parts = await run_sync(store.uploads.parts, upload_id)
    return {**upload.model_dump(mode="json"), "parts": [part.model_dump(mode="json") for part in parts]}


@router.post("/v1/uploads/{upload_id}/parts", **_PART)
async def add_part(request: Request, upload_id: str) -> dict[str, Any]:
    """One part: multipart/form-data with the bytes in the field `data`. Its size is bounded by what the upload announced."""
    services = services_of(request)
    data = stream_field(request.headers.get("Content-Type"), _counted(request.stream(), services.metrics), "data")
    try:
        async with aclosing(data):
            part = await services.store.uploads.add_part(upload_id, data)
    except ClientDisconnect as error:
        raise ClientGone from error
    return part.model_dump(mode="json")


@router.post("/v1/uploads/{upload_id}/complete", **described(Upload, 404, 409, body=CompleteUpload))
async def complete_upload(
    request: Request, upload_id: str, body: Annotated[CompleteUpload, Depends(json_body(CompleteUpload))]
) -> dict[str, Any]:
    """Assemble the parts, in the order given, to a file."""
    store = services_of(request).store
    upload = await run_sync(partial(store.uploads.complete, upload_id, body.part_ids, body.md5))
    return upload.model_dump(mode="json")


@router.post("/v1/uploads/{upload_id}/cancel", **described(Upload, 404, 409))
async def cancel_upload(request: Request, upload_id: str) -> dict[str, Any]:
    """Drop a pending upload and its parts."""
    upload = await run_sync(services_of(request).store.uploads.cancel, upload_id)
    return upload.model_dump(mode="json")


@router.get("/v1/files/{file_id}", **described(File, 404))
async def get_file(request: Request, file_id: str) -> dict[str, Any]:
    file = await run_sync(services_of(request).store.files.get, file_id)
    return file.model_dump(mode="json")


@router.delete("/v1/files/{file_id}", **described(Deleted, 404))
async def delete_file(request: Request, file_id: str) -> dict[str, Any]:
    """A checkpoint that was made of the file keeps its bytes."""
    await run_sync(services_of(request).store.files.delete, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


async def _counted(stream: AsyncIterator[bytes], metrics: Metrics) -> AsyncGenerator[bytes, None]:
    async for chunk in stream:
        metrics.upload_bytes.inc(len(chunk))
        yield chunk
