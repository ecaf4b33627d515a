"""Uploads, files, checkpoints, models and memory through the official client and plain HTTP, over a real store."""

import hashlib
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

PART = 1 << 20


def upload(server: Any, path: Path) -> str:
    done = server.openai.uploads.upload_file_chunked(file=path, mime_type="application/octet-stream", purpose="user_data")
    assert done.status == "completed" and done.file is not None
    return str(done.file.id)


@pytest.fixture
def checkpoint(server: Any, tiny: Path) -> Iterator[str]:
    """`tiny`, uploaded with the official client and made a checkpoint."""
    ids = [upload(server, path) for path in sorted(tiny.iterdir())]
    answer = server.http.post("/v1/checkpoints", json={"name": "mine", "files": ids})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == "/v1/checkpoints/mine"
    for file_id in ids:
        server.openai.files.delete(file_id)
    yield "mine"
    server.engine.resident.clear()
    server.http.delete("/v1/checkpoints/mine")


def test_the_official_client_uploads_in_parts(server: Any, tmp_path: Path) -> None:
    content = os.urandom(3 * PART + 17)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    done = server.openai.uploads.upload_file_chunked(
        file=path, mime_type="application/octet-stream", purpose="user_data", part_size=PART, md5=hashlib.md5(content).hexdigest()
    )
    assert done.file.bytes == len(content) and done.file.filename == "model.gguf"
    assert server.store.files.path(done.file.id).read_bytes() == content
    assert server.openai.files.retrieve(done.file.id).id == done.file.id
    assert server.openai.files.delete(done.file.id).deleted
    with pytest.raises(openai.NotFoundError):
        server.openai.files.retrieve(done.file.id)


def test_an_upload_resumes_from_its_parts(server: Any) -> None:
    created = server.openai.uploads.create(bytes=6, filename="a.bin", mime_type="text/plain", purpose="user_data")
    second = server.openai.uploads.parts.create(created.id, data=b"def")
    first = server.openai.uploads.parts.create(created.id, data=b"abc")
    seen = server.http.get(f"/v1/uploads/{created.id}").json()
    assert [(part["id"], part["bytes"]) for part in seen["parts"]] == [(second.id, 3), (first.id, 3)]
    with pytest.raises(openai.BadRequestError):
        server.openai.uploads.complete(created.id, part_ids=[first.id])
    done = server.openai.uploads.complete(created.id, part_ids=[first.id, second.id])
    assert server.store.files.path(done.file.id).read_bytes() == b"abcdef"
    with pytest.raises(openai.ConflictError):
        server.openai.uploads.parts.create(created.id, data=b"x")


def test_a_cancelled_upload_takes_no_parts(server: Any) -> None:
    created = server.openai.uploads.create(bytes=6, filename="a.bin", mime_type="text/plain", purpose="user_data")
    assert server.openai.uploads.cancel(created.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        server.openai.uploads.parts.create(created.id, data=b"x")


def test_a_part_is_never_whole_in_memory(server: Any) -> None:
    size = 64 << 20
    created = server.openai.uploads.create(bytes=size, filename="a.bin", mime_type="text/plain", purpose="user_data")
    head = b'--b\r\nContent-Disposition: form-data; name="data"; filename="x"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size >> 16):
            yield bytes(1 << 16)
        yield b"\r\n--b--\r\n"

    tracemalloc.start()
    try:
        answer = server.http.post(
            f"/v1/uploads/{created.id}/parts", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 200 and answer.json()["bytes"] == size
    assert peak < 8 << 20, "of client and server together"
    server.openai.uploads.cancel(created.id)


FIELD = b'--b\r\nContent-Disposition: form-data; name="data"\r\n\r\nabc\r\n'
BAD_PARTS = {
    "no multipart": (b"abc", "text/plain"),
    "no boundary": (b"abc", "multipart/form-data"),
    "long boundary": (b"abc", "multipart/form-data; boundary=" + "x" * 300),
    "cut off": (FIELD, "multipart/form-data; boundary=b"),
    "garbage": (b"garbage", "multipart/form-data; boundary=b"),
    "empty": (b"", "multipart/form-data; boundary=b"),
    "no field": (b"--b--\r\n", "multipart/form-data; boundary=b"),
    "another field": (FIELD.replace(b'"data"', b'"file"') + b"--b--\r\n", "multipart/form-data; boundary=b"),
    "no name": (b"--b\r\nX: y\r\n\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b"),
    "twice": (FIELD + FIELD + b"--b--\r\n", "multipart/form-data; boundary=b"),
    "empty part": (FIELD.replace(b"abc", b"") + b"--b--\r\n", "multipart/form-data; boundary=b"),
    "endless headers": (b"--b\r\n" + b"X: y\r\n" * 5000 + b"\r\nabc\r\n--b--\r\n", "multipart/form-data; boundary=b"),
}


@pytest.mark.parametrize(("body", "content_type"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_bad_parts_leave_nothing(server: Any, body: bytes, content_type: str) -> None:
    created = server.openai.uploads.create(bytes=100, filename="a.bin", mime_type="text/plain", purpose="user_data")
    answer = server.http.post(f"/v1/uploads/{created.id}/parts", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert server.store.uploads.parts(created.id) == []


def test_a_part_above_what_was_announced_is_413(server: Any) -> None:
    created = server.openai.uploads.create(bytes=2, filename="a.bin", mime_type="text/plain", purpose="user_data")
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai.uploads.parts.create(created.id, data=b"abc")
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bytes": 0, "filename": "a"}, "bytes"),
        ({"bytes": "5", "filename": "a"}, "bytes"),
        ({"bytes": 5}, "filename"),
        ({"bytes": 5, "filename": "../a"}, "filename"),
        ({"bytes": 5, "filename": "a", "expires_after": {}}, "expires_after"),
    ],
)
def test_bad_announcements(server: Any, body: dict[str, Any], param: str) -> None:
    answer = server.http.post("/v1/uploads", json={"mime_type": "a/b", "purpose": "user_data", **body})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_an_uploaded_checkpoint_answers_and_goes(server: Any, checkpoint: str) -> None:
    assert checkpoint in [entry["id"] for entry in server.http.get("/v1/checkpoints").json()["data"]]
    facts = server.http.get("/v1/checkpoints/mine").json()
    assert "dir" not in facts and facts["source"] == "upload"
    assert server.openai.completions.create(model="mine", prompt="a", max_tokens=2).usage.completion_tokens == 2
    refused = server.http.delete("/v1/checkpoints/mine")
    assert refused.status_code == 409 and "unload mine@bf16" in refused.json()["error"]["message"]
    assert server.http.post("/v1/models/mine/unload").json()["resident"] is False
    assert server.http.delete("/v1/checkpoints/mine").json()["deleted"] is True
    assert server.http.get("/v1/checkpoints/mine").status_code == 404
    assert server.http.post("/v1/completions", json={"model": "mine", "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "files"),
        ({"files": [], "path": "/x"}, 400, "files"),
        ({"files": ["f"], "path": "/x"}, 400, "path"),
        ({"files": ["nope"]}, 404, "file_id"),
        ({"path": "/etc"}, 400, "path"),
        ({"hub": "a/b"}, 400, "hub"),
        ({"path": "/x", "revision": "main"}, 400, "revision"),
        ({"files": ["f"], "quantize": ["rtn-w5"]}, 400, "quantize"),
        ({"files": ["f"], "quantize": ["bf16"]}, 400, "quantize"),
        ({"files": ["f"], "quantise": []}, 400, "quantise"),
    ],
)
def test_bad_checkpoints(server: Any, body: dict[str, Any], status: int, param: str) -> None:
    answer = server.http.post("/v1/checkpoints", json={"name": "new", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_paths_only_under_allowed_roots(serve: Any, tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tiny)
    (root / "model").mkdir()
    for path in tiny.iterdir():
        (root / "model" / path.name).write_bytes(path.read_bytes())
    with serve(allowed_roots=[root]) as server:
        for path in (tiny, root / "link", root / ".." / "root2", root / "nothing", "/etc/passwd", f"{root}/a\0b"):
            answer = server.http.post("/v1/checkpoints", json={"name": "of-path", "path": str(path)})
            assert answer.status_code == 400 and "no file or folder under an allowed root" in answer.json()["error"]["message"]
        answer = server.http.post("/v1/checkpoints", json={"name": "of-path", "path": str(root / "model")})
        assert answer.status_code == 201, answer.text
        assert server.http.delete("/v1/checkpoints/of-path").status_code == 200


def test_models_list_names_and_variants(server: Any) -> None:
    listed = {model.id: model for model in server.openai.models.list()}
    assert set(listed) >= {"demo", "demo@bf16"}
    assert listed["demo"].owned_by == "precis" and listed["demo"].object == "model"
    assert listed["demo"].resident is False and listed["demo"].precision == "bf16" and listed["demo"].bytes > 500 << 20
    server.openai.completions.create(model="demo@fp32", prompt="a", max_tokens=1)
    resident = {model.id: model for model in server.openai.models.list()}["demo@fp32"]
    assert resident.resident is True and resident.kernels == {"reference": 210}
    assert sum(resident.memory.values()) == 1000 and resident.scheme == {"kind": "float", "dtype": "fp32"}


def test_one_model(server: Any) -> None:
    assert server.openai.models.retrieve("demo@fp16").id == "demo@fp16"
    assert server.openai.models.retrieve("demo").variant == "demo@bf16"
    for unknown in ("nobody", "demo@rtn-w4g64"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.openai.models.retrieve(unknown)
        assert caught.value.code == "model_not_found" and "demo" in caught.value.message
    with pytest.raises(openai.BadRequestError):
        server.openai.models.retrieve("demo@nothing")


def test_load_unload_and_memory(server: Any) -> None:
    assert server.http.get("/v1/memory").json()["memory"] is None
    loaded = server.http.post("/v1/models/demo@fp16/load").json()
    assert loaded["id"] == "demo@fp16" and loaded["resident"] is True
    assert server.http.get("/v1/memory").json()["memory"]["residents"][0]["key"] == {"model": "demo", "precision": "fp16"}
    assert server.http.post("/v1/models/demo@fp16/unload").status_code == 200
    again = server.http.post("/v1/models/demo@fp16/unload")
    assert again.status_code == 404 and again.json()["error"]["code"] == "not_resident"


def test_without_on_load_a_missing_variant_is_404_and_says_what_exists(serve: Any) -> None:
    with serve(on_load=False) as server:
        answer = server.http.post("/v1/completions", json={"model": "demo@rtn-w4g64", "prompt": "a"})
        assert answer.status_code == 404
        assert "fp32, bf16, fp16" in answer.json()["error"]["message"] and "/v1/quantize/jobs" in answer.json()["error"]["message"]
        assert not server.engine.seen and not server.store.jobs.list(checkpoint="demo")


def test_health_ready_version(server: Any) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/ready").status_code == 200
    assert server.http.get("/ready", params={"model": "demo"}).status_code == 503
    server.http.post("/v1/models/demo/load")
    assert server.http.get("/ready", params={"model": "demo"}).json() == {
        "ready": True,
        "engine": True,
        "models": {"demo@bf16": True, "demo": True},
    }
    server.engine.alive = False
    assert server.http.get("/ready").status_code == 503 and server.http.get("/health").status_code == 200
