"""The product as its user meets it: `precis serve`, the official client, precisions of a real model, an upload that is quantized."""

import signal
import time
from pathlib import Path

import httpx
import pytest
from conftest import MODEL, RECIPES, LiveServer, start_server, stop_server
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from server.sources import demo_file

READY_SECONDS = 15  # what a second start may take
PATIENCE_SECONDS = 300  # quantizing on load, on a machine that has other work


@pytest.fixture(scope="module")
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE_SECONDS, max_retries=0)


def ask(client: OpenAI, model: str, *, stream: bool = False) -> str:
    """The greedy answer to one question, whole or put together from its stream."""
    options = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    if not stream:
        return client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("model", [MODEL, *(f"{MODEL}@{precision}" for precision in ("bf16", *RECIPES))])
def test_every_precision_answers_the_same_text_streamed_and_whole(client: OpenAI, model: str) -> None:
    whole = ask(client, model)
    assert "Paris" in whole
    assert ask(client, model, stream=True) == whole


def test_a_recipe_without_a_variant_is_quantized_on_load(client: OpenAI) -> None:
    assert len(ask(client, f"{MODEL}@rtn-w8")) > 10
    assert f"{MODEL}@rtn-w8" in [model.id for model in client.models.list()]


def test_metrics_show_latency_and_bytes_of_each_precision(client: OpenAI, server: LiveServer) -> None:
    for precision in ("bf16", *RECIPES):
        ask(client, f"{MODEL}@{precision}")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.labels.get("model") == MODEL and sample.labels.get("kind", "weights") == "weights":
                found[sample.name, sample.labels["precision"]] = found.get((sample.name, sample.labels["precision"]), 0) + sample.value
    for precision in ("bf16", *RECIPES):
        for name in (
            "time_to_first_token_seconds_count",
            "inter_token_latency_seconds_count",
            "request_duration_seconds_count",
            "memory_bytes",
        ):
            assert found[f"precis_{name}", precision] > 0, (name, precision)
    weights = {precision: found["precis_memory_bytes", precision] for precision in ("bf16", *RECIPES)}
    assert weights["rtn-w4g64"] < 0.35 * weights["bf16"], weights
    assert found["precis_variant_kl_divergence", "bf16"] < found["precis_variant_kl_divergence", "rtn-w4g64"]


def test_unquantized_tensors_are_held_once(client: OpenAI, server: LiveServer) -> None:
    """The embedding, 57 MB in bf16, belongs to bf16 and to both quantized variants: three copies would show in the process's memory."""
    memory = httpx.get(f"{server.url}/v1/memory").json()["memory"]
    residents = [each for each in memory["residents"] if each["key"]["precision"] in ("bf16", *RECIPES)]
    assert len({each["bytes"]["shared_weights"] for each in residents}) == 1
    assert memory["shared_bytes"] == residents[0]["bytes"]["shared_weights"]


def test_the_official_client_uploads_a_model_which_is_quantized_and_answers(client: OpenAI, server: LiveServer) -> None:
    upload = client.uploads.upload_file_chunked(file=demo_file(), mime_type="application/octet-stream", purpose="user_data")
    answer = httpx.post(
        f"{server.url}/v1/checkpoints",
        json={"name": "mine", "files": [upload.file.id], "quantize": ["rtn-w4g64"]},
        timeout=PATIENCE_SECONDS,
    )
    assert answer.status_code in (201, 202), answer.text
    job = answer.json()["jobs"][0]["id"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (state := httpx.get(f"{server.url}/v1/quantize/jobs/{job}").json())["state"] not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    assert state["state"] == "succeeded", state
    assert ask(client, "mine@rtn-w4g64") == ask(client, f"{MODEL}@rtn-w4g64")


def test_a_second_start_is_ready_in_seconds_and_sigterm_ends_it(demo_data: Path) -> None:
    began = time.monotonic()
    server = start_server(demo_data, MODEL, "--recipes", *RECIPES)
    try:
        while httpx.get(f"{server.url}/ready").status_code != httpx.codes.OK:
            assert time.monotonic() - began < READY_SECONDS
            time.sleep(0.05)
    finally:
        status = stop_server(server)
    assert status == -signal.SIGTERM  # uvicorn drains, then dies of the signal that it was sent
