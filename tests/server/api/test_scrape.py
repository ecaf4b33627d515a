"""The metrics of a running server."""

from typing import Any

import pytest


def scrape(server: Any) -> str:
    answer = server.http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return str(answer.text)


def count(server: Any, outcome: str, model: str = "demo", precision: str = "bf16", endpoint: str = "completions") -> float:
    start = f'precis_requests_total{{endpoint="{endpoint}",model="{model}",outcome="{outcome}",precision="{precision}"}} '
    return next((float(line.removeprefix(start)) for line in scrape(server).splitlines() if line.startswith(start)), 0.0)


def test_outcomes_are_counted(server: Any) -> None:
    import httpx2

    body = {"model": "demo", "prompt": "a", "max_tokens": 2}
    before = {outcome: count(server, outcome) for outcome in ("length", "stop", "rejected", "cancelled", "error")}
    server.http.post("/v1/completions", json=body)
    server.http.post("/v1/completions", json={**body, "stream": True})
    server.engine.eos_after = 1
    server.http.post("/v1/completions", json=body)
    server.http.post("/v1/completions", json={**body, "max_tokens": 1000})
    server.engine.fail_after = 0
    server.http.post("/v1/completions", json={**body, "stream": True})
    server.engine.fail_after, server.engine.token_seconds = None, 5.0
    with pytest.raises(httpx2.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=0.1)
    server.wait_for(lambda: count(server, "cancelled") == before["cancelled"] + 1)
    after = {outcome: count(server, outcome) - before[outcome] for outcome in before}
    assert after == {"length": 2, "stop": 1, "rejected": 1, "cancelled": 1, "error": 1}


def test_callers_invent_no_labels(server: Any) -> None:
    before = count(server, "rejected", "unknown", "unknown")
    for model in ("invented-by-caller", "demo@invented-by-caller"):
        server.http.post("/v1/completions", json={"model": model, "prompt": "a"})
    server.http.post("/v1/completions", content=b"{")
    assert count(server, "rejected", "unknown", "unknown") == before + 3
    assert "invented" not in scrape(server)


def test_an_unloaded_variant_keeps_counters_and_loses_gauges(server: Any) -> None:
    server.http.post("/v1/completions", json={"model": "demo@fp16", "prompt": "a"})
    resident = 'precis_model_resident{model="demo",precision="fp16"} 1.0'
    assert resident in scrape(server)
    assert 'precis_model_load_duration_seconds_count{model="demo",precision="fp16",source="artifact"}' in scrape(server)
    server.http.post("/v1/models/demo@fp16/unload")
    text = scrape(server)
    assert 'precis_generated_tokens_total{model="demo",precision="fp16"}' in text
    gauges = ("precis_model_resident", "precis_memory_bytes", "precis_requests_running", "precis_kv_cache_usage_ratio", "precis_model_info")
    assert not [line for line in text.splitlines() if line.startswith(gauges) and 'precision="fp16"' in line]


def test_uploaded_bytes_are_counted(server: Any) -> None:
    created = server.openai.uploads.create(bytes=5000, filename="a", mime_type="a/b", purpose="user_data")

    def received() -> float:
        return next(float(line.split()[1]) for line in scrape(server).splitlines() if line.startswith("precis_upload_bytes_total"))

    before = received()
    server.openai.uploads.parts.create(created.id, data=b"x" * 5000)
    assert 5000 <= received() - before < 6000
    server.openai.uploads.cancel(created.id)
