"""The scrape: names and labels of the documentation's table, values that follow what was asked, and no label of a caller's making."""

import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from model_store.store import Store
from server.engine.interface import ResidentInfo, VariantKey
from server.gauges import Gauges
from server.metrics import LATENCY_BUCKETS, UNKNOWN, Metrics, RequestMeter

KEY = VariantKey(model="m", precision="rtn-w4g64")


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = list(text_string_to_metric_families(text.decode()))
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families for sample in family.samples}


def value(text: bytes, name: str, **labels: str) -> float | None:
    return samples(text).get((name, frozenset(labels.items())))


VARIANT = {"model": "m", "precision": "rtn-w4g64"}


def test_a_request_from_arrival_to_end() -> None:
    metrics = Metrics()
    meter = RequestMeter(metrics, "completions")
    meter.variant = KEY
    meter.started(7)
    for choice in (0, 0, 0, 1):
        meter.token(choice)
    meter.sequence(cached_tokens=4, output_tokens=3)
    meter.finish("length")
    meter.finish("cancelled")
    text = metrics.exposition()
    expected = {
        "precis_prompt_tokens_total": 7,
        "precis_prompt_tokens_cached_total": 4,
        "precis_generated_tokens_total": 4,
        "precis_time_to_first_token_seconds_count": 1,
        "precis_inter_token_latency_seconds_count": 2,
        "precis_queue_duration_seconds_count": 1,
        "precis_request_duration_seconds_count": 1,
        "precis_prompt_tokens_sum": 7,
        "precis_output_tokens_sum": 3,
    }
    assert {name: value(text, name, **VARIANT) for name in expected} == expected
    assert value(text, "precis_requests_total", **VARIANT, endpoint="completions", outcome="length") == 1
    assert value(text, "precis_requests_total", **VARIANT, endpoint="completions", outcome="cancelled") is None


def test_tokens_of_one_message_share_the_time_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    metrics = Metrics()
    meter = RequestMeter(metrics, "completions")
    meter.variant = KEY
    for seconds, together in ((0.0, 1), (0.03, 3), (0.2, 1)):
        now += seconds
        for _ in range(together):
            meter.token(0, together)
            meter.token(1, together)
    text = metrics.exposition()
    assert value(text, "precis_inter_token_latency_seconds_count", **VARIANT) == 8
    assert value(text, "precis_inter_token_latency_seconds_sum", **VARIANT) == pytest.approx(2 * 0.23)
    assert value(text, "precis_inter_token_latency_seconds_bucket", **VARIANT, le="0.015") == 6
    assert value(text, "precis_time_to_first_token_seconds_sum", **VARIANT) == 0


def test_counter_and_histogram_of_one_stem_do_not_clash() -> None:
    metrics = Metrics()
    meter = RequestMeter(metrics, "completions")
    meter.started(1)
    text = metrics.exposition().decode()
    assert "# TYPE precis_prompt_tokens histogram" in text and "# TYPE precis_prompt_tokens_total counter" in text
    assert "_created" not in text
    types = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(types) == len(set(types))


def test_latency_buckets_are_about_doublings_from_1_ms_to_60_s() -> None:
    assert (LATENCY_BUCKETS[0], LATENCY_BUCKETS[-1]) == (0.001, 60)
    assert 1.0 in LATENCY_BUCKETS, "the alert on the latency objective counts this bucket"
    assert all(1.8 <= high / low <= 2.2 for low, high in pairwise(LATENCY_BUCKETS))


class ResidentsOnly:
    """As much of an engine as gauges read."""

    alive, restarts = True, 2

    def __init__(self, *residents: ResidentInfo) -> None:
        self._residents = {info.key: info for info in residents}

    def residents(self) -> dict[VariantKey, ResidentInfo]:
        return self._residents

    def stats(self) -> Any:
        from server.engine.interface import MemoryInfo, StepStats

        infos = tuple(self._residents.values())
        memory = MemoryInfo(
            device="cpu",
            total_bytes=9,
            used_bytes=5,
            free_bytes=4,
            budget_bytes=8,
            reserved_bytes=3,
            shared_bytes=200,
            residents=infos,
        )
        return StepStats(
            running={"m@bf16": 3},
            waiting={},
            kv_cache_usage={},
            memory=memory,
            nonfinite_logits={"m@gone": 2},
            evictions={"m@gone": 1},
            preemptions={"m@bf16": 4},
        )


def info(precision: str, weights: int) -> ResidentInfo:
    return ResidentInfo(
        key=VariantKey(model="m", precision=precision),
        device="cpu",
        max_model_len=10,
        vocab_size=10,
        dtype="bf16",
        kv_dtype="bf16",
        kernels={"b": 1, "a": 2},
        predicted_bytes=weights + 250,
        bytes={"weights": weights, "shared_weights": 200, "kv_cache": 40, "workspace": 10},
        bytes_by_dtype={},
        load_seconds=1,
    )


def scrape(store: Store, *residents: ResidentInfo) -> bytes:
    from prometheus_client import generate_latest

    registry = CollectorRegistry()
    registry.register(Gauges(store, ResidentsOnly(*residents)))  # type: ignore[arg-type]
    return generate_latest(registry)


@pytest.fixture
def empty_store(tmp_path: Path) -> Any:
    with Store(tmp_path) as store:
        yield store


def test_the_ledger_sums_to_what_is_held_with_shared_weights_once(empty_store: Store) -> None:
    text = scrape(empty_store, info("bf16", 1000), info("rtn-w4g64", 300), info("fp32", 2000))
    held = [amount for (name, _), amount in samples(text).items() if name == "precis_memory_bytes"]
    assert sum(held) == 1000 + 300 + 2000 + 3 * 50 + 2 * 200, "bf16 and rtn share one set, fp32 has its own"
    shared = {"device": "cpu", "model": "m", "kind": "shared_weights"}
    assert value(text, "precis_memory_bytes", precision="shared-bf16", **shared) == 200
    assert value(text, "precis_memory_predicted_bytes", device="cpu", model="m", precision="bf16") == 1050


def test_gauges_of_a_resident_variant(empty_store: Store) -> None:
    text = scrape(empty_store, info("bf16", 1000))
    labels = {"model": "m", "precision": "bf16"}
    assert value(text, "precis_model_resident", **labels) == 1
    assert value(text, "precis_requests_running", **labels) == 3
    assert value(text, "precis_requests_waiting", **labels) == 0
    assert value(text, "precis_engine_restarts_total") == 2
    facts = {"method": "none", "weight_bits": "16", "group_size": "none", "activation_bits": "none", "kv_dtype": "bf16", "kernel": "a+b"}
    assert value(text, "precis_model_info", **labels, **facts) == 1
    assert value(text, "precis_device_memory_bytes", device="cpu", state="budget") == 8


def test_the_engines_own_counters_outlive_residency(empty_store: Store) -> None:
    text = scrape(empty_store)
    assert value(text, "precis_nonfinite_logits_total", model="m", precision="gone") == 2
    assert value(text, "precis_preemptions_total", model="m", precision="bf16") == 4
    assert value(text, "precis_model_evictions_total", model="m", precision="gone", reason="room") == 1


def test_nothing_resident_has_no_gauges_but_states_are_zero(empty_store: Store) -> None:
    text = scrape(empty_store)
    assert not [name for name, labels in samples(text) if "precision" in dict(labels) and not name.endswith("_total")]
    assert value(text, "precis_quantization_jobs", state="queued") == 0
    assert value(text, "precis_uploads", state="pending") == 0


def test_a_finished_job_has_a_duration(empty_store: Store) -> None:
    from quantizers.recipe import parse_recipe

    job = empty_store.jobs.create("m", parse_recipe("rtn-w4g64"))
    empty_store.jobs.start(job.id, "test")
    empty_store.jobs.advance(job.id, stage="blocks", progress=0.25)
    text = scrape(empty_store)
    assert value(text, "precis_quantization_job_progress_ratio", **VARIANT) == 0.25
    empty_store.jobs.succeed(job.id, "m@rtn-w4g64")
    text = scrape(empty_store)
    assert value(text, "precis_quantization_job_duration_seconds_count", method="rtn") == 1
    assert value(text, "precis_quantization_job_duration_seconds_bucket", method="rtn", le="1.0") == 1
    assert value(text, "precis_quantization_job_progress_ratio", **VARIANT) is None


def test_unknown_variants_have_a_fixed_label() -> None:
    metrics = Metrics()
    RequestMeter(metrics, "completions").finish("rejected")
    labels = {"model": UNKNOWN.model, "precision": UNKNOWN.precision}
    assert value(metrics.exposition(), "precis_requests_total", **labels, endpoint="completions", outcome="rejected") == 1
