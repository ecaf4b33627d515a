"""The Dockerfile's commands, word for word, without Docker; then the server that they install.

A stage is a private overlay over this machine's own file system: the commands see their real paths (`/opt/precis`, `/data`), run as the
users that they name, and change nothing outside. This machine's Python and C library stand for the base image's. So what is NOT shown here
is that `python:*-slim` has all that is needed (one library that it lacks, libgomp, is hidden), the CUDA variant, layers, and a Docker
daemon's own work.
"""

import json
import os
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Instruction

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.base_prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_SECONDS = 180  # the first start reads the demo model's GGUF file and writes a checkpoint


class Stage:
    """One stage: its root folder, and the state that instructions change."""

    def __init__(self, holder: int, root: Path, arguments: dict[str, str]) -> None:
        self.holder, self.root, self.global_arguments = holder, root, arguments
        self.environment = {"PATH": PATH, "HOME": "/root"} | {
            k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()
        }
        self.workdir, self.user = "/", "0"
        self.words: dict[str, str] = {}  # ENTRYPOINT, CMD, HEALTHCHECK

    def expand(self, text: str) -> str:
        return string.Template(text).substitute(self.environment)

    def command(self, *words: str, **environment: str) -> list[str]:
        """`words` as they would run in a container of this stage: entered from outside, in its own root, environment, folder and user."""
        variables = [f"{name}={value}" for name, value in (self.environment | environment).items()]
        enter = ["nsenter", f"--target={self.holder}", "--mount", "chroot", f"--userspec={self.user}", str(self.root)]
        return [*enter, "/usr/bin/env", "-i", *variables, "/bin/sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words, **environment), capture_output=True, text=True, timeout=900)

    def inside(self, path: str) -> Path:
        return self.root / os.path.normpath(f"{self.workdir}/{path}" if not path.startswith("/") else path).lstrip("/")


def context_into(target: Path) -> None:
    """What `.dockerignore` lets through: a list of exceptions from `*`, and compiled Python nowhere."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        source = ROOT / line.strip("!/")
        if line.startswith("!") and source.is_dir():
            shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif line.startswith("!"):
            shutil.copy(source, target)


def copy(stage: Stage, words: list[str], context: Path, stages: dict[str, Stage]) -> None:
    *sources, target = words
    origin = context
    if sources[0].startswith("--from="):
        origin, sources = stages[sources[0].removeprefix("--from=")].root, sources[1:]
    into = stage.inside(target)
    outside = ["nsenter", f"--target={stage.holder}", "--mount"]
    for source in sources:
        there = origin / source.lstrip("/")
        is_folder = subprocess.run([*outside, "test", "-d", there]).returncode == 0
        folder = into if is_folder or target.endswith("/") or len(sources) > 1 else into.parent
        subprocess.run([*outside, "mkdir", "-p", folder], check=True)
        subprocess.run([*outside, "cp", "-a", f"{there}/." if is_folder else there, into], check=True)


def follow(stage: Stage, instruction: "Instruction", context: Path, stages: dict[str, Stage]) -> None:
    word, rest = instruction.word, instruction.rest
    if word == "ARG":
        name, _, default = rest.partition("=")
        stage.environment[name] = stage.global_arguments.get(name, default)
    elif word == "ENV":
        stage.environment |= dict(item.split("=", 1) for item in stage.expand(rest).split())
    elif word == "WORKDIR":
        stage.workdir = rest
        subprocess.run(["nsenter", f"--target={stage.holder}", "--mount", "mkdir", "-p", stage.inside(".")], check=True)
    elif word == "USER":
        stage.user = rest
    elif word == "COPY":
        copy(stage, rest.split(), context, stages)
    elif word == "RUN":
        result = stage.run("/bin/sh", "-c", rest)
        assert result.returncode == 0, f"RUN {rest}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    elif word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        stage.words[word] = rest[rest.index("[") :]
    else:
        assert word in ("VOLUME", "EXPOSE"), f"this test does not know {word}: teach it"


def mounts(folder: Path, names: list[str]) -> str:
    """A shell script that makes an overlay of this machine for every stage, and says `ready` when they stand."""
    lines = ["set -eu"]
    for name in names:
        root, upper, work = (folder / name / part for part in ("root", "upper", "work"))
        lines += [
            f"mkdir -p {root} {upper} {work}",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={upper},workdir={work} {root}",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            f"rm -f {root}/usr/lib/*-linux-gnu/libgomp.so.1*",
            # The base image's Python can be run by everyone, and is called `python`.
            *(f"chmod o+x {root}{parent}" for parent in Path(sys.base_prefix).parents),
            f"[ -e {root}{sys.base_prefix}/bin/python ] || ln -s python3 {root}{sys.base_prefix}/bin/python",
        ]
    return "\n".join([*lines, "echo ready", "exec sleep infinity"])


@pytest.fixture(scope="module")
def image(dockerfile: "list[Instruction]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The last stage, after every instruction of the Dockerfile was followed."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("LEFT OUT: the Dockerfile's commands need root and a mount namespace of their own here, so they were not run")
    folder, context = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("context")
    context_into(context)
    names = [instruction.rest.split(" AS ")[1] for instruction in dockerfile if instruction.word == "FROM"]
    unshare = ["unshare", "--mount", "--propagation=private", "sh", "-c", mounts(folder, names)]
    with subprocess.Popen(unshare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stderr is not None
            if holder.stdout.readline() != "ready\n":
                pytest.skip(f"LEFT OUT: no overlay can be mounted here, so the Dockerfile's commands were not run: {holder.stderr.read()}")
            yield build(dockerfile, holder.pid, folder, context)
        finally:
            holder.terminate()
    shutil.rmtree(folder)


def build(dockerfile: "list[Instruction]", holder: int, folder: Path, context: Path) -> Stage:
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for instruction in dockerfile:
        if instruction.word == "FROM":
            name = instruction.rest.split(" AS ")[1]
            stages[name] = stage = Stage(holder, folder / name / "root", arguments)
        elif not stages:
            assert instruction.word == "ARG", instruction
        else:
            follow(stage, instruction, context, stages)
    return stage


def test_the_command_runs_as_the_images_user(image: Stage) -> None:
    result = image.run(*json.loads(image.words["ENTRYPOINT"]), "doctor", "--json")
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout


def test_the_source_tree_is_not_needed(image: Stage) -> None:
    result = image.run("python", "-c", "import server; print(server.__file__)")
    assert result.stdout.startswith("/opt/precis/lib/"), result.stderr


def test_the_user_can_write_its_data_and_nothing_of_the_program(image: Stage) -> None:
    assert image.run("sh", "-c", 'touch "$PRECIS_DATA_DIR/x" && rm "$PRECIS_DATA_DIR/x"').returncode == 0
    assert image.run("touch", "/opt/precis/bin/precis").returncode != 0
    assert image.run("id", "-un").stdout == "precis\n"


def test_the_server_becomes_healthy_answers_and_stops(image: Stage) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    health = json.loads(image.words["HEALTHCHECK"])
    assert image.run(*health, PRECIS_PORT=port).returncode != 0, "the health check passes without a server"
    words = [*json.loads(image.words["ENTRYPOINT"]), *json.loads(image.words["CMD"]), "--demo"]
    with subprocess.Popen(image.command(*words, PRECIS_PORT=port)) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_SECONDS
            while not is_ready(url):
                assert server.poll() is None and time.monotonic() < deadline, f"not ready within {READY_SECONDS} s"
                time.sleep(0.5)
            assert image.run(*health, PRECIS_PORT=port).returncode == 0
            body = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
            assert "Paris" in answer["choices"][0]["text"]
        finally:
            server.terminate()
    assert server.returncode in (0, -15), "SIGTERM reaches the server, which is the container's first process"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
