"""The dashboard as a file: what Grafana would refuse or draw wrongly, found without Grafana (none is run here)."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Dashboard, Values

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = {"bytes", "s", "reqps", "short", "none", "percentunit", "suffix: tok/s"}  # ids of Grafana's units, or a suffix of our own
GRID_WIDTH = 24
BUILT_IN = {"__all", "__range", "__rate_interval"}


def test_there_is_a_precision_comparison() -> None:
    assert [path.stem for path in (DEPLOY / "grafana" / "dashboards").iterdir()] == ["precision-comparison"]


def test_identity_is_stable_and_new_enough(dashboard: "Dashboard") -> None:
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard.data["uid"])
    assert "id" not in dashboard.data, "the number of a dashboard belongs to one Grafana's database"
    assert dashboard.data["schemaVersion"] >= 39
    numbers = [panel["id"] for panel in dashboard.panels]
    assert len(set(numbers)) == len(numbers)


def test_panels_do_not_overlap(dashboard: "Dashboard") -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard.panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_WIDTH, panel["title"]
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"], f"{panel['title']} lies on {taken[cell]}"


def test_every_panel_says_its_unit_and_what_it_shows(dashboard: "Dashboard") -> None:
    for panel in dashboard.panels:
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        overrides = [item for override in panel["fieldConfig"]["overrides"] for item in override["properties"] if item["id"] == "unit"]
        assert all(item["value"] in UNITS for item in overrides), panel["title"]


def test_no_data_source_is_hard_coded(dashboard: "Dashboard") -> None:
    assert set(re.findall(r'"uid": "([^"]*)"', json.dumps(dashboard.data))) == {dashboard.data["uid"], "${datasource}"}


def test_every_variable_that_is_used_is_defined(dashboard: "Dashboard") -> None:
    assert {"datasource", "model", "precision"} <= dashboard.variables.keys()
    assert dashboard.variables_used <= dashboard.variables.keys() | BUILT_IN
    precision = dashboard.variables["precision"]
    assert precision["multi"] and precision["includeAll"]


def test_queries_choose_model_and_precision_and_keep_precisions_apart(dashboard: "Dashboard") -> None:
    for query in dashboard.queries:
        selectors = re.findall(r"precis_\w+\{([^}]*)\}", query.expr)
        assert len(selectors) == len(re.findall(r"precis_\w+", query.expr)), f"a metric without a selector: {query}"
        chosen = 'precision=~"$precision"', 'kind="shared_weights"'  # what precisions share belongs to none of them
        assert all('model="$model"' in selector and any(one in selector for one in chosen) for selector in selectors), str(query)
        assert query.repeated or re.search(r"by \([^)]*\bprecision\b", query.expr), f"precisions are added up: {query}"


def test_legends_name_the_precision(dashboard: "Dashboard") -> None:
    for panel in dashboard.panels:
        for target in panel.get("targets", []):
            assert target["format"] == "table" or "{{precision}}" in target["legendFormat"] or "$precision" in panel["title"], panel[
                "title"
            ]


def test_provisioning_fits_compose_and_scraping() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/precis.yml").read_text())["providers"][0]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    assert source["url"].removeprefix("$") in compose["services"]["grafana"]["environment"]
    assert "uid" not in source


def test_compose_is_pinned_closed_and_checked() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        if name != "precis":  # built here; the image brings its own health check
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: pin the image to a release"
            assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), f"{name} is open to the network"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
    grafana = compose["services"]["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "${GRAFANA_ANONYMOUS:-false}"
    assert grafana["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?"), "Grafana must not start with its default password"


def test_targets_are_the_compose_service_and_this_machine() -> None:
    local = yaml.safe_load((DEPLOY / "prometheus/targets.yml").read_text())
    assert local == [{"targets": ["127.0.0.1:8000"]}]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    in_compose = yaml.safe_load(with_defaults(compose["configs"]["targets"]["content"]))
    assert in_compose == [{"targets": ["precis:8000"]}]
    assert compose["services"]["prometheus"]["configs"] == [{"source": "targets", "target": "/etc/prometheus/targets.yml"}]


def with_defaults(text: str) -> str:
    """`${NAME:-default}` as Docker Compose reads it where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_the_guide_names_every_metric_and_panel_that_is_shown(dashboard: "Dashboard", metric_names: Callable[[str], set[str]]) -> None:
    guide = (ROOT / "docs" / "monitoring.md").read_text()
    base = re.compile(r"_(bucket|sum|count)$")
    shown = {base.sub("", name) for query in dashboard.queries for name in metric_names(query.expr)}
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    shown |= {base.sub("", name) for name in metric_names(alerts)}
    assert shown - metric_names(guide) == set()
    titles = {panel["title"] for panel in dashboard.panels if panel["type"] != "row"}
    assert {title for title in titles if title.removesuffix(": $precision") not in guide} == set()
    assert set(re.findall(r"alert: (\w+)", alerts)) - set(re.findall(r"`(Precis\w+)`", guide)) == set()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": "m", "precision": ["bf16"]}, 'x{model="m", precision=~"bf16"}'),
        ({"model": "m", "precision": ["bf16", "rtn-w4g64"]}, 'x{model="m", precision=~"(bf16|rtn-w4g64)"}'),
        ({"model": "m", "precision": ["a.b"]}, r'x{model="m", precision=~"a\\.b"}'),
    ],
)
def test_variables_are_substituted_as_grafana_does(substitute: "Callable[[str, Values], str]", values: "Values", expected: str) -> None:
    assert substitute('x{model="$model", precision=~"${precision}"}', values) == expected


def test_a_variable_without_a_value_is_an_error(substitute: "Callable[[str, Values], str]") -> None:
    with pytest.raises(KeyError, match="typo"):
        substitute("x[$typo]", {})
