"""/openapi.json says what every route takes and gives, and the answers of a running server are what it says."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from model_store.uploads import Part, Upload
from server.api import objects
from server.app import ROUTERS

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Hi", "max_tokens": 3}


@pytest.fixture(scope="module")
def description(shared_server: Any) -> dict[str, Any]:
    found: dict[str, Any] = shared_server.http.get("/openapi.json").json()
    return found


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in description["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_route_says_what_it_gives_and_which_errors(description: dict[str, Any]) -> None:
    found = list(operations(description))
    assert len(found) == sum(len(router.routes) for router in ROUTERS)
    for method, path, operation in found:
        answers = operation["responses"]
        (success,) = [answer for status, answer in answers.items() if status.startswith("2")]
        for content in success["content"].values():
            assert content["schema"] not in ({}, {"type": "object"}), (method, path)
        for status in ("400", "401", "500"):
            assert answers[status]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
        assert "422" not in answers
        assert ("404" in answers) >= ("{" in path), "what is named in a path may not be there"
        assert "503" in answers


def test_every_body_is_described(description: dict[str, Any]) -> None:
    with_body = {path for method, path, operation in operations(description) if "requestBody" in operation}
    assert with_body == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/uploads",
        "/v1/uploads/{upload_id}/parts",
        "/v1/uploads/{upload_id}/complete",
        "/v1/checkpoints",
        "/v1/quantize/jobs",
    }
    chat = description["components"]["schemas"]["ChatRequest"]
    assert set(chat["required"]) == {"model", "messages"} and {"tools", "response_format", "seed"} <= set(chat["properties"])
    assert {"type": "null"} in chat["properties"]["seed"]["anyOf"]


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    found = set(references(description))
    assert found and all(reference.removeprefix("#/components/schemas/") in schemas for reference in found)


def check(model: type[BaseModel], answer: Any, status: int = 200) -> None:
    assert answer.status_code == status, answer.text
    model.model_validate_json(answer.text, strict=True)


def test_answers_are_as_described(server: Any) -> None:
    http = server.http
    check(objects.ChatCompletion, http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}))
    check(objects.Completion, http.post("/v1/completions", json={**COMPLETION, "logprobs": 2, "echo": True}))
    check(objects.ModelList, http.get("/v1/models"))
    check(objects.Model, http.get("/v1/models/demo"))
    check(objects.Model, http.post("/v1/models/demo/load"))
    check(objects.Memory, http.get("/v1/memory"))
    check(objects.Unloaded, http.post("/v1/models/demo/unload"))
    check(objects.CheckpointList, http.get("/v1/checkpoints"))
    check(objects.CheckpointEntry, http.get("/v1/checkpoints/demo"))
    check(objects.MethodList, http.get("/v1/methods"))
    check(objects.JobList, http.get("/v1/quantize/jobs"))
    check(objects.Health, http.get("/health"))
    check(objects.Ready, http.get("/ready"))
    check(objects.Version, http.get("/version"))
    check(objects.Error, http.get("/v1/models/nobody"), 404)
    check(objects.Error, http.post("/v1/completions", json={}), 400)


def test_events_are_as_described(server: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path, body, model in (
        ("/v1/chat/completions", {**CHAT, **options, "logprobs": True}, objects.ChatCompletionChunk),
        ("/v1/completions", {**COMPLETION, **options, "logprobs": 1}, objects.Completion),
    ):
        text = server.http.post(path, json=body).text
        *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert done == "[DONE]" and len(events) > 2
        for event in events:
            model.model_validate(json.loads(event))


def test_uploads_are_as_described(server: Any) -> None:
    http = server.http
    created = http.post("/v1/uploads", json={"bytes": 3, "filename": "a.bin"})
    check(Upload, created)
    where = f"/v1/uploads/{created.json()['id']}"
    part = http.post(f"{where}/parts", files={"data": b"abc"})
    check(Part, part)
    check(objects.UploadWithParts, http.get(where))
    check(Upload, http.post(f"{where}/complete", json={"part_ids": [part.json()["id"]]}))
