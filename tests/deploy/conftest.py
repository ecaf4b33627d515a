"""What the deployment's tests share: Dockerfile and dashboards as data, variables substituted as Grafana does, Prometheus' tools."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
_METRIC = re.compile(r"\bprecis_[a-z0-9_]+")
_VARIABLE = re.compile(r"\$\{?([a-zA-Z_]\w*)\}?")
_SPECIAL = re.compile(r"[$^*{}\[\]'+?.()|]")

Values = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Query:
    """One query of a panel; `repeated` where the panel is drawn once for each precision."""

    panel: str
    expr: str
    instant: bool
    repeated: bool

    def with_values(self, values: Values) -> str:
        return _substitute(self.expr, values)

    def __str__(self) -> str:
        return f"{self.panel}: {self.expr}"


class Dashboard:
    """A dashboard's JSON, and views of it."""

    def __init__(self, path: Path) -> None:
        self.data: dict[str, Any] = json.loads(path.read_text())
        rows = self.data["panels"]
        self.panels: list[dict[str, Any]] = [inner for panel in rows for inner in (panel, *panel.get("panels", []))]
        self.variables: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in self.data["templating"]["list"]}
        self.queries = [
            Query(panel["title"], target["expr"], target["instant"], "repeat" in panel)
            for panel in self.panels
            for target in panel.get("targets", [])
        ]

    @property
    def variables_used(self) -> set[str]:
        return set(_VARIABLE.findall(json.dumps(self.data)))


@dataclass(frozen=True)
class Instruction:
    """One instruction of the Dockerfile, continuation lines joined: `RUN`, `useradd ...`."""

    word: str
    rest: str


@pytest.fixture(scope="session")
def dockerfile() -> list[Instruction]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def _substitute(text: str, values: Values) -> str:
    """`text` with its variables replaced as Grafana's Prometheus data source does. A list is a variable that allows several values.

    One value of such a variable is escaped as a regular expression, several become `(a|b)`. A KeyError names a variable without a value.
    """

    def value_of(match: re.Match[str]) -> str:
        value = values[match[1]]
        if isinstance(value, str):
            return value
        escaped = [_SPECIAL.sub(r"\\\\\g<0>", item) for item in value]  # two backslashes: one level is PromQL's own string
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(value_of, text)


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem, scope="session")
def dashboard(request: pytest.FixtureRequest) -> Dashboard:
    return Dashboard(request.param)


@pytest.fixture(scope="session")
def substitute() -> Callable[[str, Values], str]:
    return _substitute


@pytest.fixture(scope="session")
def metric_names() -> Callable[[str], set[str]]:
    """Names of the server's metrics in an expression or a page; recording rules (`precis:...`) are not among them."""
    return lambda text: set(_METRIC.findall(text))


@pytest.fixture(scope="session")
def promtool() -> str:
    return _installed("promtool")


@pytest.fixture(scope="session")
def prometheus_binary() -> str:
    return _installed("prometheus")


def _installed(command: str) -> str:
    """Path of Prometheus' `command`; skips the test, saying what was left out, where the Debian package `prometheus` is not installed."""
    path = shutil.which(command)
    if path is None:
        pytest.skip(f"LEFT OUT: {command} is not installed (Debian package prometheus), so what it would check was not checked")
    return path
