"""Every query of the dashboards and every metric of the alerts, asked of a real Prometheus that scraped the real server."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from conftest import Dashboard, Query, Values

ROOT = Path(__file__).parents[2]
SCRAPE_SECONDS = 1
ROUNDS = 3  # of traffic; rate() needs counters that move between two scrapes, and a series that did not exist before does not count
PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus that scrapes one server, and the variants of one model that had traffic while it did."""

    url: str
    model: str
    precisions: list[str]
    began: float

    def get(self, path: str, **params: str | float) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def series(self, expr: str, *, instant: bool) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and finite values of every series of `expr`: now, or at every scrape since the traffic began."""
        now = time.time()
        if instant:
            rows = self.get("query", query=expr, time=now)["result"]
            samples = [(row["metric"], [row["value"]]) for row in rows]
        else:
            rows = self.get("query_range", query=expr, start=self.began, end=now, step=SCRAPE_SECONDS)["result"]
            samples = [(row["metric"], row["values"]) for row in rows]
        finite = [(labels, [float(value) for _, value in values if math.isfinite(float(value))]) for labels, values in samples]
        return [(labels, values) for labels, values in finite if values]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS} s"
        time.sleep(0.1)


def _configure(folder: Path, target: str) -> None:
    """Our own configuration with two changes: what is scraped, and how often, so that the test need not wait."""
    shutil.copytree(ROOT / "deploy" / "prometheus", folder, dirs_exist_ok=True)
    (folder / "targets.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    configuration = yaml.safe_load((folder / "prometheus.yml").read_text())
    configuration["global"] |= {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))


def _residents(server: str) -> dict[str, list[str]]:
    """Precisions by model, of the variants that are in memory now."""
    found: dict[str, list[str]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name == "precis_model_resident" and sample.value == 1:
                found.setdefault(sample.labels["model"], []).append(sample.labels["precision"])
    return found


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _scrapes(url: str) -> int:
    result = httpx.get(f"{url}/api/v1/query", params={"query": 'sum_over_time(up{job="precis"}[10m])'}, timeout=30).json()["data"]["result"]
    return int(float(result[0]["value"][1])) if result else 0


def _traffic(server: str, model: str, precisions: list[str]) -> None:
    for precision in precisions:
        body = {"model": f"{model}@{precision}", "prompt": "The three primary colours are", "max_tokens": 8, "ignore_eos": True}
        httpx.post(f"{server}/v1/completions", json=body, timeout=120).raise_for_status()


@pytest.fixture(scope="module")
def prometheus(live_server: str, prometheus_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with our configuration on `live_server`, which has several precisions of one model, after some rounds of traffic."""
    folder, port = tmp_path_factory.mktemp("prometheus"), _free_port()
    _configure(folder, live_server.removeprefix("http://"))
    model, precisions = max(_residents(live_server).items(), key=lambda item: len(item[1]), default=("", []))
    assert len(precisions) >= 2, "side by side needs two resident precisions of one model"
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    command = [prometheus_binary, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    with log.open("w") as output, subprocess.Popen(command, cwd=folder, stdout=output, stderr=output) as process:
        try:
            _wait(f"Prometheus, which says {log}", lambda: _is_up(url))
            began = time.time()
            for _ in range(ROUNDS):
                before = _scrapes(url)
                _wait("a scrape before traffic", lambda seen=before: _scrapes(url) > seen)  # type: ignore[misc]
                _traffic(live_server, model, precisions)
            after = _scrapes(url)
            _wait("two scrapes after traffic", lambda: _scrapes(url) >= after + 2)
            yield Prometheus(url, model, precisions, began)
        finally:
            process.terminate()


def _values(prometheus: Prometheus, precisions: list[str]) -> "Values":
    """The variables as Grafana would set them for a data source whose scrape interval is ours: $__rate_interval is four of it."""
    elapsed = max(1, round(time.time() - prometheus.began))
    return {
        "model": prometheus.model,
        "precision": precisions,
        "__rate_interval": f"{4 * SCRAPE_SECONDS}s",
        "__range": f"{elapsed + 2 * SCRAPE_SECONDS}s",
    }


def test_every_query_has_data(dashboard: "Dashboard", prometheus: Prometheus) -> None:
    """For each precision that had traffic. One series is enough of artifacts, which baselines lack, and of what is shared."""
    missing: list[str] = []
    for query in dashboard.queries:
        if query.repeated:
            missing += [f"{query} [{one}]" for one in prometheus.precisions if not _ask(prometheus, query, [one])]
            continue
        found = {labels["precision"] for labels, _ in _ask(prometheus, query, prometheus.precisions)}
        one_is_enough = found and ("precis_variant_" in query.expr or "shared_weights" in query.expr)
        missing += [f"{query} [{one}]" for one in prometheus.precisions if one not in found and not one_is_enough]
    assert missing == []


def _ask(prometheus: Prometheus, query: "Query", precisions: list[str]) -> list[tuple[dict[str, str], list[float]]]:
    return prometheus.series(query.with_values(_values(prometheus, precisions)), instant=query.instant)


def test_quantiles_are_ordered_and_within_the_buckets(dashboard: "Dashboard", prometheus: Prometheus) -> None:
    """A p95 below the p50, or one in the last bucket, would say that the histogram or the query is wrong."""
    by_panel: dict[str, list[float]] = {}
    for query in dashboard.queries:
        if "histogram_quantile" in query.expr and not query.instant:
            longest = max(value for _, values in _ask(prometheus, query, prometheus.precisions[:1]) for value in values)
            by_panel.setdefault(query.panel, []).append(longest)
    assert by_panel
    for panel, values in by_panel.items():
        assert values == sorted(values) and values[0] > 0 and values[-1] < 60, (panel, values)


def test_variables_offer_the_models_and_precisions(dashboard: "Dashboard", prometheus: Prometheus, substitute: Any) -> None:
    for name, expected in (("model", {prometheus.model}), ("precision", set(prometheus.precisions))):
        query = substitute(dashboard.variables[name]["definition"], {"model": prometheus.model})
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match is not None, query
        assert expected <= set(prometheus.get(f"label/{match[2]}/values", **{"match[]": match[1]}))


def test_every_name_is_one_that_the_server_exports(
    dashboard: "Dashboard", live_server: str, metric_names: Callable[[str], set[str]]
) -> None:
    exported = _exported(live_server)
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    assert metric_names(json.dumps(dashboard.data)) | metric_names(alerts) <= exported


def test_the_latency_objective_is_a_bucket(live_server: str, prometheus: Prometheus) -> None:
    """An alert that asks for a bucket that does not exist never fires."""
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    selectors = re.findall(r'precis_\w+_bucket\{le="[^"]+"\}', alerts)
    assert selectors
    for selector in set(selectors):
        assert prometheus.series(selector, instant=True), selector


def test_alert_states_exist(prometheus: Prometheus) -> None:
    """The states that alerts ask for are always reported, at 0 too: a series that appears with its first failure has no increase."""
    for selector in (
        'precis_device_memory_bytes{state="used"}',
        'precis_device_memory_bytes{state="budget"}',
        'precis_quantization_jobs{state="failed"}',
        "precis_engine_restarts_total",
    ):
        assert prometheus.series(selector, instant=True), selector


def test_no_alert_fires_on_a_healthy_server(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def _exported(server: str) -> set[str]:
    """Sample names of everything on the server's page, `_bucket`, `_sum` and `_count` of histograms included."""
    names: set[str] = set()
    for family in text_string_to_metric_families(httpx.get(f"{server}/metrics", timeout=30).text):
        names |= {sample.name for sample in family.samples} | {family.name}
        if family.type == "counter":
            names.add(f"{family.name}_total")
        elif family.type == "histogram":
            names |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
    return names
