"""Fixtures of the whole suite: the demo checkpoint, made once in the clone's `.cache` and kept, and a real server over it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from model_store.formats.gguf import convert_gguf_apart
from model_store.store import Store
from server.sources import demo_file

CACHE = Path(__file__).parent.parent / ".cache"
MODEL = "smollm2-135m-instruct"
RECIPES = ("rtn-w4g64", "bnb-nf4")


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder of the demo checkpoint, SmolLM2-135M-Instruct: config, tokenizer, chat template, fp32 safetensors."""
    target = CACHE / "demo"
    if not target.is_dir():
        CACHE.mkdir(exist_ok=True)
        convert_gguf_apart(demo_file(), CACHE / "demo.part")
        (CACHE / "demo.part").rename(target)
    return target


@dataclass
class LiveServer:
    """A running `precis serve`: its address, its process, its data directory."""

    url: str
    process: subprocess.Popen[str]
    data_dir: Path


def precis(*arguments: str) -> list[str]:
    """The command line that runs `precis`, of this tree."""
    return [sys.executable, "-m", "server.cli", *arguments]


def start_server(data_dir: Path, *arguments: str) -> LiveServer:
    """`precis serve` on a free port, once it says that it listens."""
    command = precis("serve", *arguments, "--port", "0", "--data-dir", str(data_dir))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"listens on (http://\S+)", line):
            return LiveServer(found[1], process, data_dir)
    raise AssertionError(f"precis serve ended with status {process.wait()} before it listened")


def stop_server(server: LiveServer) -> int:
    """SIGTERM, and the exit status."""
    with server.process as process:
        process.terminate()
        return process.wait(timeout=60)


@pytest.fixture(scope="session")
def demo_data(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory that has the demo checkpoint, two quantized variants and their reports (a window of text each)."""
    data_dir = tmp_path_factory.mktemp("data")
    with Store(data_dir) as store:
        store.checkpoints.import_folder(MODEL, demo)
    subprocess.run(precis("evaluate", MODEL, "bf16", *RECIPES, "--windows", "1", "--data-dir", str(data_dir)), check=True)
    return data_dir


@pytest.fixture(scope="session")
def server(demo_data: Path) -> Iterator[LiveServer]:
    """The real server over the demo checkpoint, bf16 and two quantized variants resident."""
    server = start_server(demo_data, MODEL, "--recipes", *RECIPES)
    try:
        while httpx.get(f"{server.url}/ready").status_code != httpx.codes.OK:
            assert server.process.poll() is None, "precis serve ended before it was ready"
            time.sleep(0.1)
        yield server
    finally:
        stop_server(server)


@pytest.fixture(scope="session")
def live_server(server: LiveServer) -> str:
    """Address of the real server."""
    return server.url
