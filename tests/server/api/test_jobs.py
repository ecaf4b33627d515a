"""Methods and quantization jobs over HTTP, run by the real job runner in a real process over a small checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantizers.methods import METHODS


@pytest.fixture(scope="module")
def small(tiny: Path, demo_store: Any) -> Iterator[str]:
    """The name of a checkpoint that quantizes in a moment."""
    demo_store.checkpoints.import_folder("small", tiny)
    yield "small"
    demo_store.checkpoints.delete("small")


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def test_every_method_has_schema_and_defaults(server: Any) -> None:
    listed = {entry["id"]: entry for entry in server.http.get("/v1/methods").json()["data"]}
    assert set(listed) == set(METHODS)
    for name, entry in listed.items():
        assert entry["summary"] and entry["schema"]["properties"] and entry["defaults"]["name"] == name


def test_a_job_from_202_to_an_answer(server: Any, small: str) -> None:
    answer = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": "rtn-w4g64"})
    assert answer.status_code == 202, answer.text
    where = answer.headers["Location"]
    assert where == f"/v1/quantize/jobs/{answer.json()['id']}"
    same = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": "rtn-w4g64"})
    assert same.json()["id"] == answer.json()["id"], "one open job a variant"
    events = events_of(server.http.get(f"{where}/events", timeout=120).text)
    job = server.http.get(where).json()
    assert job["state"] == "succeeded", job
    assert [event_id for event_id, _, _ in events] == list(range(1, len(events) + 1))
    assert events[0][1] == "queued" and events[-1][1] == "succeeded"
    resumed = events_of(server.http.get(f"{where}/events", headers={"Last-Event-ID": str(events[-2][0])}).text)
    assert resumed == events[-1:]
    assert where.rsplit("/", 1)[1] in [entry["id"] for entry in server.http.get("/v1/quantize/jobs").json()["data"]]
    assert server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": "rtn-w4g64"}).status_code == 409
    assert server.http.post(f"{where}/cancel").status_code == 409
    served = server.http.post("/v1/completions", json={"model": f"{small}@rtn-w4g64", "prompt": "a"})
    assert served.status_code == 200 and served.headers["X-Served-Precision"] == "rtn-w4g64"
    assert server.engine.specs[-1].artifact_dir == str(server.store.variants.get(small, "rtn-w4g64").dir)
    entry = server.openai.models.retrieve(f"{small}@rtn-w4g64")
    assert entry.method == "rtn" and entry.bytes > 0 and entry.scheme["weight_bits"] == 4


def test_a_request_quantizes_on_load_and_says_so_in_the_metrics(server: Any, small: str) -> None:
    answer = server.http.post("/v1/completions", json={"model": f"{small}@rtn-w8", "prompt": "a"}, timeout=120)
    assert answer.status_code == 200, answer.text
    line = f'precis_model_load_duration_seconds_count{{model="{small}",precision="rtn-w8",source="quantize_on_load"}} 1.0'
    assert line in server.http.get("/metrics").text


def test_waiting_for_a_variant_is_bounded(serve: Any, small: str) -> None:
    with serve(load_timeout_seconds=0.3) as server:
        answer = server.http.post("/v1/completions", json={"model": f"{small}@rtn-w4g32", "prompt": "a"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
        job = server.http.get("/v1/quantize/jobs").json()["data"][-1]
        assert job["slug"] == "rtn-w4g32" and job["state"] in ("queued", "running"), "the work goes on"
        assert server.http.post(f"/v1/quantize/jobs/{job['id']}/cancel").json()["state"] == "cancelled"


def test_training_says_its_loss_and_a_cancelled_job_leaves_nothing(server: Any, small: str) -> None:
    slug = "zeroquant.steps2000-w4g64a8"
    shown = {"samples": 4, "length": 32}
    job = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": slug, "calibration": shown}).json()
    folder = server.store.training(small, slug)
    server.wait_for(lambda: any("loss" in event.data for event in server.store.jobs.events_since(job["id"])), 120)
    server.wait_for(lambda: folder.exists() and any(folder.iterdir()), 120)
    assert server.http.post(f"/v1/quantize/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    server.wait_for(lambda: not folder.exists(), 30)
    events = events_of(server.http.get(f"/v1/quantize/jobs/{job['id']}/events").text)
    losses = [data["loss"] for _, _, data in events if data.get("stage") == "train" and "loss" in data]
    assert losses and all(loss > 0 for loss in losses)


def test_upload_and_quantize_starts_its_jobs(server: Any, tiny: Path) -> None:
    ids = []
    for path in sorted(tiny.iterdir()):
        done = server.openai.uploads.upload_file_chunked(file=path, mime_type="application/octet-stream", purpose="user_data")
        ids.append(done.file.id)
    body = {"name": "uploaded", "files": ids, "quantize": ["rtn-w4g64", "rtn-w4g64"]}
    answer = server.http.post("/v1/checkpoints", json=body)
    assert answer.status_code == 201, answer.text
    (job,) = answer.json()["jobs"]
    assert events_of(server.http.get(f"/v1/quantize/jobs/{job['id']}/events", timeout=120).text)[-1][1] == "succeeded"
    assert server.http.post("/v1/completions", json={"model": "uploaded@rtn-w4g64", "prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody", "recipe": "rtn-w8"}, 404, "model"),
        ({"model": "small", "recipe": "nothing"}, 400, "recipe"),
        ({"model": "small", "recipe": "bf16"}, 400, "recipe"),
        ({"model": "small"}, 400, "recipe"),
        ({"model": "small", "recipe": 4}, 400, "recipe"),
        ({"model": "small", "recipe": "rtn-w8", "force": True}, 400, "force"),
    ],
)
def test_bad_jobs(server: Any, small: str, body: dict[str, Any], status: int, param: str) -> None:
    answer = server.http.post("/v1/quantize/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.mark.parametrize("last", ["x", "-1", "\u0663".encode(), "9" * 30])
def test_bad_last_event_ids(server: Any, small: str, last: Any) -> None:
    job = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": "rtn-w3g128"}).json()
    answer = server.http.get(f"/v1/quantize/jobs/{job['id']}/events", headers={"Last-Event-ID": last})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "Last-Event-ID"
    server.http.post(f"/v1/quantize/jobs/{job['id']}/cancel")


def test_what_is_preloaded_is_awaited_by_ready(serve: Any) -> None:
    with serve(preload=["demo", "demo@fp32", "nobody"]) as server:
        server.wait_for(lambda: len(server.engine.resident) == 2)
        ready = server.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["models"] == {"demo@bf16": True, "demo@fp32": True, "nobody": False}
    with serve(preload=["demo"]) as server:
        server.wait_for(lambda: server.http.get("/ready").status_code == 200)


def upload(server: Any, name: str, content: str) -> str:
    """The id of an uploaded file."""
    made = server.openai.uploads.upload_file_chunked(
        file=content.encode(), filename=name, bytes=len(content.encode()), mime_type="text/plain", purpose="user_data"
    )
    return str(made.file.id)


def finished(server: Any, job: dict[str, Any]) -> dict[str, Any]:
    server.http.get(f"/v1/quantize/jobs/{job['id']}/events", timeout=120)
    over: dict[str, Any] = server.http.get(f"/v1/quantize/jobs/{job['id']}").json()
    return over


def test_a_job_calibrates_on_what_it_is_told(server: Any, small: str) -> None:
    """Each source of tokens, and what the manifest says of it: documents, and the model's own text."""
    lines = [json.dumps({"text": f"Document number {number} speaks of bread."}) for number in range(4)]
    documents = upload(server, "documents.jsonl", "\n".join([*lines, json.dumps({"messages": [{"role": "user", "content": "Hello?"}]})]))
    for slug, wanted, facts in (
        ("gptq-w4g32", {"source": documents, "samples": 5, "length": 64}, {"source": "documents.jsonl", "samples": 5, "length": 64}),
        (
            "gptq-w4g64",
            {"source": "self", "samples": 3, "length": 16, "seed": 2},
            {"source": "self", "samples": 3, "tokens": 48, "seed": 2},
        ),
    ):
        answer = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": slug, "calibration": wanted})
        assert answer.status_code == 202, answer.text
        assert answer.json()["options"]["calibration"]["samples"] == wanted["samples"]
        job = finished(server, answer.json())
        assert job["state"] == "succeeded", job
        said = server.store.variants.get(small, slug).facts["calibration"]
        assert said.items() >= facts.items() and len(said["sha256"]) == 64
        assert slug != "gptq-w4g32" or said["tokens"] < 5 * 64, "documents shorter than a sample are padded, and padding is no token"


@pytest.mark.parametrize(
    ("calibration", "recipe", "status", "param"),
    [
        ({"source": "/etc/passwd"}, "gptq-w8", 404, "calibration.source"),
        ({"source": "file-0"}, "gptq-w8", 404, "calibration.source"),
        ({"samples": 0}, "gptq-w8", 400, "calibration.samples"),
        ({"samples": True}, "gptq-w8", 400, "calibration.samples"),
        ({"length": 1}, "gptq-w8", 400, "calibration.length"),
        ({"seed": -1}, "gptq-w8", 400, "calibration.seed"),
        ({"text": "a"}, "gptq-w8", 400, "calibration.text"),
        ("pydoc", "gptq-w8", 400, "calibration"),
        ({"source": "self"}, "rtn-w8g32", 400, "calibration"),
    ],
)
def test_bad_calibrations(server: Any, small: str, calibration: Any, recipe: str, status: int, param: str) -> None:
    answer = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": recipe, "calibration": calibration})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_what_only_the_work_finds_out_fails_the_job_by_name(server: Any, small: str) -> None:
    source = upload(server, "bad.jsonl", "\n{}\n")
    answer = server.http.post("/v1/quantize/jobs", json={"model": small, "recipe": "gptq-w3g32", "calibration": {"source": source}})
    job = finished(server, answer.json())
    assert job["state"] == "failed" and "line 2 of 'bad.jsonl'" in job["error"]["message"] and job["error"]["param"] == "calibration"


def test_upload_and_quantize_takes_a_calibration(server: Any, tiny: Path) -> None:
    ids = [server.openai.uploads.upload_file_chunked(file=path, mime_type="a/b", purpose="user_data").file.id for path in tiny.iterdir()]
    body = {"name": "calibrated", "files": ids, "quantize": ["rtn-w8"], "calibration": {"samples": 2, "length": 16}}
    refused = server.http.post("/v1/checkpoints", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "calibration"
    answer = server.http.post("/v1/checkpoints", json={**body, "quantize": ["gptq-w8"]})
    assert answer.status_code == 201, answer.text
    (job,) = answer.json()["jobs"]
    assert finished(server, job)["state"] == "succeeded"
    assert server.store.variants.get("calibrated", "gptq-w8").facts["calibration"]["samples"] == 2
