"""What the server counts, in Prometheus' form; names, types and labels are those that the documentation's table lists.

Counters and histograms are written where things happen, through a RequestMeter for generation. Gauges are in `server.gauges`.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.engine.interface import VariantKey

# Two of our names differ by `_total` only (a counter and a histogram of prompt tokens); their `_created` samples would be one name.
disable_created_metrics()  # type: ignore[no-untyped-call]

Outcome = Literal["stop", "length", "cancelled", "rejected", "error"]

# One set for every latency, so that two precisions can be laid over each other: 1 ms to 60 s, about x2, on round numbers.
LATENCY_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
LENGTH_BUCKETS = tuple(float(1 << power) for power in range(18))  # tokens, to 128 Ki
UNKNOWN = VariantKey(model="unknown", precision="unknown")  # requests that named no variant of ours: callers invent no labels
VARIANT = ("model", "precision")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # OpenMetrics has one name space for families, see above


class _Unnamed(Collector):
    """Collects `metric` without announcing its name, which the registry would take for a clash with the counter of that stem."""

    def __init__(self, metric: Collector) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return self._metric.collect()


class Metrics:
    """Every counter and histogram, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "finished requests", *VARIANT, "endpoint", "outcome")
        self.request_duration = self._latency("request_duration_seconds", "arrival to last byte")
        self.queue_duration = self._latency("queue_duration_seconds", "arrival to first scheduled step")
        self.time_to_first_token = self._latency("time_to_first_token_seconds", "arrival to first token")
        self.inter_token_latency = self._latency(
            "inter_token_latency_seconds", "between tokens of a sequence; those of one message share its time"
        )
        self.prompt_tokens_total = self._counter("prompt_tokens", "prompt tokens of accepted sequences", *VARIANT)
        self.cached_tokens_total = self._counter("prompt_tokens_cached", "prompt tokens taken from the cache", *VARIANT)
        self.generated_tokens_total = self._counter("generated_tokens", "generated tokens", *VARIANT)
        self.prompt_tokens = Histogram("precis_prompt_tokens", "tokens of a prompt", VARIANT, buckets=LENGTH_BUCKETS, registry=None)
        self.registry.register(_Unnamed(self.prompt_tokens))
        self.output_tokens = self._histogram("output_tokens", "generated tokens of a sequence", LENGTH_BUCKETS, *VARIANT)
        self.load_duration = self._histogram("model_load_duration_seconds", "time to become resident", LATENCY_BUCKETS, *VARIANT, "source")
        self.upload_bytes = self._counter("upload_bytes", "bytes of upload parts received")

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"precis_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"precis_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, LATENCY_BUCKETS, *VARIANT)


@dataclass
class _Message:
    """came: when. seconds_each: between its tokens, None in the first. to_come: of its tokens, not counted yet."""

    came: float
    seconds_each: float | None
    to_come: int


class RequestMeter:
    """One HTTP request from arrival to last byte. `finish` counts it once, whoever calls it first."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._arrival = time.perf_counter()
        self._messages: dict[int, _Message] = {}  # choice -> the newest of the engine's messages that brought tokens of it
        self._of_tokens: tuple[Counter, Histogram] | None = None
        self._queued = False
        self._finished = False
        self.variant = UNKNOWN

    def started(self, prompt_tokens: int) -> None:
        """A sequence was accepted by the engine."""
        if not self._queued:
            self._queued = True
            self._metrics.queue_duration.labels(*self._labels).observe(time.perf_counter() - self._arrival)
        self._metrics.prompt_tokens_total.labels(*self._labels).inc(prompt_tokens)
        self._metrics.prompt_tokens.labels(*self._labels).observe(prompt_tokens)

    def token(self, choice: int, together: int = 1) -> None:
        """Another token of a choice; so many of it, this one counted, came in one message, and each has an equal part of the time since
        the message before. `variant` is known by now, and is not changed any more."""
        now = time.perf_counter()
        if self._of_tokens is None:
            self._metrics.time_to_first_token.labels(*self._labels).observe(now - self._arrival)
            # Looked up once: it takes longer than counting does, and there are hundreds of tokens a second.
            self._of_tokens = (
                self._metrics.generated_tokens_total.labels(*self._labels),
                self._metrics.inter_token_latency.labels(*self._labels),
            )
        generated, latency = self._of_tokens
        message = self._messages.get(choice)
        if message is None or message.to_come == 0:
            each = None if message is None else (now - message.came) / together
            message = self._messages[choice] = _Message(now, each, together)
        message.to_come -= 1
        if message.seconds_each is not None:
            latency.observe(message.seconds_each)
        generated.inc()

    def sequence(self, cached_tokens: int, output_tokens: int) -> None:
        """A sequence ended well."""
        self._metrics.cached_tokens_total.labels(*self._labels).inc(cached_tokens)
        self._metrics.output_tokens.labels(*self._labels).observe(output_tokens)

    def finish(self, outcome: Outcome) -> None:
        if self._finished:
            return
        self._finished = True
        self._metrics.requests.labels(*self._labels, self._endpoint, outcome).inc()
        self._metrics.request_duration.labels(*self._labels).observe(time.perf_counter() - self._arrival)

    @property
    def _labels(self) -> tuple[str, str]:
        return self.variant.model, self.variant.precision
