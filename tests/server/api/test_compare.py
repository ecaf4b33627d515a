"""GET /v1/compare gives what `precis compare --json` writes, and a wrong question one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.cli import main


@pytest.fixture(scope="module")
def measured(demo_store: Any, tiny: Path) -> str:
    """The checkpoint `compared` in the server's store, with a measured variant."""
    demo_store.checkpoints.import_folder("compared", tiny)
    assert main(["evaluate", "compared", "bf16", "rtn-w8", "--windows", "1", "--data-dir", str(demo_store.data_dir)]) == 0
    return "compared"


def test_the_route_gives_what_the_command_writes(server: Any, measured: str, tmp_path: Path) -> None:

    command = ["compare", measured, "--json", str(tmp_path / "all.json"), "--data-dir", str(server.store.data_dir)]
    assert main(command) == 0
    answer = server.http.get("/v1/compare", params={"model": measured})
    assert answer.status_code == 200
    assert answer.json() == {"object": "comparison", **json.loads((tmp_path / "all.json").read_text())}
    alone = server.http.get("/v1/compare", params={"model": [f"{measured}@rtn-w8", f"{measured}@bf16"]}).json()
    assert [row["id"] for row in alone["variants"]] == [f"{measured}@rtn-w8", f"{measured}@bf16"]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("", 400, "model"),
        ("model=", 400, None),
        ("model=nothing-here", 404, "model"),
        ("model=compared&model=demo", 400, "model"),
        ("model=compared@rtn-w3", 404, "model"),
        ("model=..%2Fsecret", 400, None),
        ("&".join("model=compared" for _ in range(65)), 400, "model"),
        ("model=compared@%F0%9F%92%A5", 400, None),
    ],
)
def test_a_wrong_question_is_one_clear_error(server: Any, measured: str, query: str, status: int, param: str | None) -> None:
    answer = server.http.get(f"/v1/compare?{query}")
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] and (param is None or error["param"] == param)
