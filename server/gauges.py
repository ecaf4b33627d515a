"""Gauges of the server, and what the engine counts itself, read at each scrape.

The numbers are those that the engine last reported and that the store has; no scrape waits for the engine. A variant that is not
resident has no gauges, its report's included; what it counted before stays (`server.metrics`).
"""

import math
import platform
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from model_store.store import Store
from quantizers.errors import NotFound
from quantizers.recipe import parse_recipe
from server.engine.interface import Engine, ResidentInfo, StepStats, VariantKey
from server.metrics import VARIANT

JOB_BUCKETS = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 900, 1800, 3600, 7200, 14400)  # seconds: a job takes from one to hours
REPORT_GAUGES = {
    "perplexity": ("variant_perplexity", "perplexity in the variant's report"),
    "kl_divergence": ("variant_kl_divergence", "KL divergence from the checkpoint's reference, nats a token, in the report"),
    "top1_agreement": ("variant_top1_agreement_ratio", "share of tokens whose likeliest next token is the reference's, in the report"),
}


class Gauges(Collector):
    """Registered with the registry of `server.metrics`; its `collect` reads the store, so it runs in a thread."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store, self._engine = store, engine

    def describe(self) -> list[Metric]:
        return []  # names are known only with what is resident; the registry need not ask at the start

    def collect(self) -> Iterator[Metric]:
        residents = self._engine.residents()
        yield from _server(self._engine)
        yield from _residents(residents)
        yield from _reports(self._store, residents)
        yield from _jobs(self._store)
        yield from _uploads(self._store)
        stats = self._engine.stats()
        if stats is not None:
            yield from _engine_counters(stats)
            yield from _load(stats, residents)
            yield from _device(stats, residents)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"precis_{name}", text, labels=labels)


def _server(engine: Engine) -> Iterator[Metric]:
    yield CounterMetricFamily("precis_engine_restarts", "times that the engine's process was started again", value=engine.restarts)
    yield InfoMetricFamily("precis_build", "versions", value={"version": version("precis"), "python": platform.python_version()})


def _residents(residents: dict[VariantKey, ResidentInfo]) -> Iterator[Metric]:
    resident = _gauge("model_resident", "1 where resident", *VARIANT)
    predicted = _gauge("memory_predicted_bytes", "predicted before allocation, shared weights left out", "device", *VARIANT)
    info = InfoMetricFamily("precis_model", "what is in effect", labels=[*VARIANT])
    for key, facts in residents.items():
        resident.add_metric([key.model, key.precision], 1)
        predicted.add_metric([facts.device, key.model, key.precision], facts.predicted_bytes - facts.bytes.get("shared_weights", 0))
        info.add_metric([key.model, key.precision], model_info(key, facts))
    yield from (resident, predicted, info)


def model_info(key: VariantKey, facts: ResidentInfo) -> dict[str, str]:
    """The labels of `precis_model_info`: each from a bounded set."""
    recipe = parse_recipe(key.precision)
    scheme = recipe.scheme
    return {
        "method": "-".join(method.name for method in recipe.methods) or "none",
        "weight_bits": str(scheme.weight_bits),
        "group_size": str(getattr(scheme, "group_size", None) or "none"),
        "activation_bits": str(getattr(scheme, "activation_bits", None) or "none"),
        "kv_dtype": facts.kv_dtype,
        "kernel": "+".join(sorted(facts.kernels)) or "none",
    }


def _reports(store: Store, residents: dict[VariantKey, ResidentInfo]) -> Iterator[Metric]:
    artifact = _gauge("variant_artifact_bytes", "bytes of the artifact's files", *VARIANT)
    gauges = {field: _gauge(name, text, *VARIANT) for field, (name, text) in REPORT_GAUGES.items()}
    for key in residents:
        try:
            variant = store.variants.get(key.model, key.precision)
        except NotFound:  # deleted while resident, or a baseline that was never evaluated
            continue
        if variant.files:
            artifact.add_metric([key.model, key.precision], variant.bytes)
        for field, gauge in gauges.items():
            value = (variant.report or {}).get(field)
            if isinstance(value, int | float):
                gauge.add_metric([key.model, key.precision], value)
    yield artifact
    yield from gauges.values()


def _jobs(store: Store) -> Iterator[Metric]:
    states = _gauge("quantization_jobs", "jobs by state", "state")
    for state, count in store.jobs.counts().items():
        states.add_metric([state], count)
    progress = _gauge("quantization_job_progress_ratio", "running jobs: 0 to 1", *VARIANT)
    for job in store.jobs.list(state="running"):
        progress.add_metric([job.checkpoint, job.slug], job.progress)
    yield from (states, progress, _job_durations(store))


def _job_durations(store: Store) -> HistogramMetricFamily:
    """Counted from the store, so that it outlives this process and needs nobody to tell it."""
    durations: dict[str, list[float]] = {}
    for job in store.jobs.list():
        if job.is_over and job.started is not None and job.finished is not None:
            durations.setdefault("-".join(method.name for method in job.recipe.methods), []).append(job.finished - job.started)
    family = HistogramMetricFamily("precis_quantization_job_duration_seconds", "time of a finished job", labels=["method"])
    for method, seconds in durations.items():
        counts = [(_bound(limit), sum(value <= limit for value in seconds)) for limit in (*JOB_BUCKETS, math.inf)]
        family.add_metric([method], buckets=counts, sum_value=sum(seconds))
    return family


def _bound(limit: float) -> str:
    """A bucket's label, as Prometheus writes numbers."""
    return "+Inf" if limit == math.inf else str(float(limit))


def _uploads(store: Store) -> Iterator[Metric]:
    uploads = _gauge("uploads", "uploads by state", "state")
    for state, count in store.uploads.counts().items():
        uploads.add_metric([state], count)
    yield uploads


def _engine_counters(stats: StepStats) -> Iterator[Metric]:
    """What the engine counts itself, for variants that are no longer resident too."""
    nonfinite = CounterMetricFamily("precis_nonfinite_logits", "requests whose logits held NaN or infinity", labels=VARIANT)
    for name, count in stats.nonfinite_logits.items():
        nonfinite.add_metric(name.split("@", 1), count)
    evictions = CounterMetricFamily("precis_model_evictions", "variants that had to go", labels=[*VARIANT, "reason"])
    for name, count in stats.evictions.items():
        evictions.add_metric([*name.split("@", 1), "room"], count)
    preemptions = CounterMetricFamily("precis_preemptions", "sequences pushed out of the cache, computed again later", labels=VARIANT)
    for name, count in stats.preemptions.items():
        preemptions.add_metric(name.split("@", 1), count)
    drafted = CounterMetricFamily("precis_draft_tokens", "tokens that were guessed and verified", labels=VARIANT)
    for name, count in stats.drafted.items():
        drafted.add_metric(name.split("@", 1), count)
    right = CounterMetricFamily("precis_draft_tokens_accepted", "guessed tokens that were right", labels=VARIANT)
    for name, count in stats.drafted_right.items():
        right.add_metric(name.split("@", 1), count)
    yield from (nonfinite, evictions, preemptions, drafted, right)


def _load(stats: StepStats, residents: dict[VariantKey, ResidentInfo]) -> Iterator[Metric]:
    for name, text, values in (
        ("requests_running", "sequences in the batch now", stats.running),
        ("requests_waiting", "sequences waiting now", stats.waiting),
        ("kv_cache_usage_ratio", "share of the cache that is in use, 0 to 1", stats.kv_cache_usage),
    ):
        gauge = _gauge(name, text, *VARIANT)
        for key in residents:
            gauge.add_metric([key.model, key.precision], values.get(str(key), 0))
        yield gauge


def _device(stats: StepStats, residents: dict[VariantKey, ResidentInfo]) -> Iterator[Metric]:
    memory = stats.memory
    device = _gauge("device_memory_bytes", "the device's memory, by the driver", "device", "state")
    for state in ("total", "used", "free", "budget", "reserved"):
        device.add_metric([memory.device, state], getattr(memory, f"{state}_bytes"))
    yield device
    yield _ledger([facts for facts in memory.residents if facts.key in residents])


def _ledger(residents: list[ResidentInfo]) -> GaugeMetricFamily:
    """Own bytes of each variant; what the variants of one checkpoint share, one set for each floating type, stands once, under the
    precision `shared-<dtype>`, so that everything sums to what is held."""
    ledger = _gauge("memory_bytes", "what the server holds; shared tensors stand once", "device", *VARIANT, "kind")
    shared: dict[tuple[str, str, str], int] = {}
    for facts in residents:
        for kind, size in facts.bytes.items():
            if kind != "shared_weights":
                ledger.add_metric([facts.device, facts.key.model, facts.key.precision, kind], size)
        group = (facts.device, facts.key.model, f"shared-{parse_recipe(facts.key.precision).dtype}")
        shared[group] = max(shared.get(group, 0), facts.bytes.get("shared_weights", 0))
    for group, size in shared.items():
        ledger.add_metric([*group, "shared_weights"], size)
    return ledger
