"""The scrape configuration and the alerts, by Prometheus' own tool: they parse, and fire when and only when they should."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"


def run(*command: str, cwd: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def alerts() -> list[dict[str, object]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_configuration_and_rules_are_valid(promtool: str) -> None:
    result = run(promtool, "check", "config", "--lint=all", "--lint-fatal", "prometheus.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_fire_when_they_should(promtool: str) -> None:
    result = run(promtool, "test", "rules", "alerts_test.yml")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("> 10 * 0.05", "> 1 * 0.05"),
        ("ratio_rate5m > 10 *", "ratio_rate5m > -1 *"),
        ("ratio_rate1h > 10 *", "ratio_rate1h > -1 *"),
        (">= 20", ">= 1"),
        (" > 0.95", " > 0.98"),
        ("> 0.10", "> 0.04"),
        ("> 1.5", "> 0.5"),
        ('job="precis"} == 0', 'job="precis"} == 1'),
        ("[30m]) > 0.5", "[30m]) > -0.5"),
    ],
)
def test_the_unit_tests_notice_a_wrong_threshold(promtool: str, tmp_path: Path, right: str, wrong: str) -> None:
    """The unit tests of the alerts would pass in vain if a changed bound went unnoticed."""
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    rules = (PROMETHEUS / "alerts.yml").read_text()
    assert rules.count(right) >= 1
    (tmp_path / "alerts.yml").write_text(rules.replace(right, wrong))
    assert run(promtool, "test", "rules", "alerts_test.yml", cwd=tmp_path).returncode != 0


def test_every_alert_has_a_unit_test_and_says_what_to_do() -> None:
    tested = {
        case["alertname"]
        for test in yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in alerts()}
    for rule in alerts():
        assert rule["labels"]["severity"] in {"page", "warn"}, rule  # type: ignore[index]
        assert set(rule["annotations"]) == {"summary", "description"}, rule  # type: ignore[call-overload]
