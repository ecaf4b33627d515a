"""Models of a Hugging Face hub, from a stand-in on the loopback that speaks what huggingface_hub asks: model info, tree, resolve."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
REPOSITORY = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository `someone/tiny`, revision `main`, and keeps what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.asked: list[str] = []
        self.broken: str | None = None  # a file that the hub fails to give

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]})
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._missing("RevisionNotFound")
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            self._json(
                [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in self.server.files.items()]
            )
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/") and (name := path.split("/", 5)[5]) in self.server.files:
            if name == self.server.broken and self.command == "GET":
                self._send(403, b"{}", {})
            else:
                self._file(self.server.files[name])
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, content: bytes) -> None:
        self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    server = Hub({**files, "README.md": b"words", "pytorch_model.bin": b"never", "onnx/model.json": b"{}"})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import json, sys
from pathlib import Path
from model_store.store import Store
from quantizers.errors import PrecisError
with Store(Path(sys.argv[1])) as store:
    try:
        checkpoint = store.checkpoints.import_hub("tiny", sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
        facts = {"digest": checkpoint.digest, "files": sorted(checkpoint.files), "source": checkpoint.source}
        print(json.dumps(facts | {"torch": "torch" in sys.modules}))
    except PrecisError as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message}))
"""


def imported(
    tmp_path: Path, endpoint: str, repo_id: str = REPOSITORY, revision: str | None = None, offline: bool = False, store: str = "data"
) -> Any:
    """The outcome of an import in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / store), repo_id, *([revision] if revision else [])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_of_the_hub_becomes_a_checkpoint_without_its_pickles(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    outcome = imported(tmp_path, hub.url)
    assert outcome["files"] == sorted(path.name for path in tiny.iterdir())
    assert outcome["source"] == "hub" and outcome["torch"] is False
    downloaded = {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert downloaded == set(outcome["files"]), "a file was downloaded that a checkpoint has no use for"


def test_the_cache_serves_when_offline_and_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    first = imported(tmp_path, hub.url)
    asked = len(hub.asked)
    assert imported(tmp_path, hub.url, offline=True, store="second")["digest"] == first["digest"]
    assert len(hub.asked) == asked
    assert imported(tmp_path, "http://127.0.0.1:9", store="third")["digest"] == first["digest"]


def test_what_the_hub_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    missing = imported(tmp_path, hub.url, repo_id="someone/else")
    assert missing["error"] == "NotFound" and "no model someone/else" in missing["message"]
    revision = imported(tmp_path, hub.url, revision="v9")
    assert revision["error"] == "NotFound" and "no revision 'v9'" in revision["message"]
    offline = imported(tmp_path, hub.url, offline=True)
    assert offline["error"] == "NotFound" and "HF_HUB_OFFLINE is on" in offline["message"]
    for bad in ("a/b/c", "../../etc", "a b"):
        assert imported(tmp_path, hub.url, repo_id=bad)["error"] == "InvalidInput"
    for bad in ("../../../etc/hostname", "a b", "-x"):
        assert imported(tmp_path, hub.url, revision=bad)["error"] == "InvalidInput"


def test_a_hub_that_breaks_off_is_named_and_leaves_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.broken = "model.safetensors"
    outcome = imported(tmp_path, hub.url)
    assert outcome["error"] == "NotFound" and "did not give someone/tiny whole" in outcome["message"]
    assert list((tmp_path / "data" / "checkpoints").iterdir()) == []
    hub.broken = None
    assert "digest" in imported(tmp_path, hub.url)


def test_a_hub_whose_files_are_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = json.dumps({**json.loads(hub.files["config.json"]), "auto_map": {"AutoModel": "x.Y"}}).encode()
    assert "auto_map" in imported(tmp_path, hub.url)["message"]
