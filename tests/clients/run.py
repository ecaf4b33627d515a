"""Other programs against a running server, each in an environment of its own: what works unmodified, as a table.

    python tests/clients/run.py [NAME...] [--environments FOLDER]

Needs the demo checkpoint in .cache/demo, a package index, and npm for those of Node. Environments are kept for the next time.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 900  # for one client
# Calls are written as Hermes writes them; the demo's own template has no tools.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall functions as <tool_call>\n"
    '{"name": ..., "arguments": {...}}\n</tool_call>: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Client:
    """`packages` go into its environment; `shares_torch`: it also sees the packages of the interpreter that runs this."""

    name: str
    packages: tuple[str, ...]
    script: str
    shares_torch: bool = False

    @property
    def node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("openai", ("openai",), "check_openai.py"),
    Client("llm", ("llm",), "check_llm.py"),
    Client("langchain", ("langchain-openai",), "check_langchain.py"),
    Client("litellm", ("litellm",), "check_litellm.py"),
    Client("instructor", ("instructor",), "check_instructor.py"),
    Client("pydanticai", ("pydantic-ai-slim[openai]",), "check_pydantic_ai.py"),
    Client("lmeval", ("lm-eval[api]",), "check_lm_eval.py", shares_torch=True),
    Client("guidellm", ("guidellm",), "check_guidellm.py"),
    Client("schemathesis", ("schemathesis",), "check_schemathesis.py"),
    Client("node", ("openai", "zod"), "check_openai.mjs"),
    Client("aisdk", ("ai", "@ai-sdk/openai-compatible", "zod"), "check_ai_sdk.mjs"),
)


def environment(client: Client, folder: Path) -> Path:
    """Folder of the client's environment, made where it is not there yet."""
    target = folder / client.name
    done = folder / f"{client.name}.ok"
    if not done.exists():
        shutil.rmtree(target, ignore_errors=True)
        if client.node:
            target.mkdir(parents=True)
            (target / "package.json").write_text('{"private": true}')
            subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund", *client.packages], cwd=target, check=True, stdout=subprocess.DEVNULL
            )
        else:
            subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
            subprocess.run([target / "bin/pip", "install", "-q", "--disable-pip-version-check", *client.packages], check=True)
        done.touch()
    if client.shares_torch:  # the same torch and transformers on both sides, so that only the server is compared
        (next((target / "lib").glob("python*")) / "site-packages/shared.pth").write_text(sysconfig.get_paths()["purelib"])
    return target


def command(client: Client, folder: Path, url: str) -> list[str]:
    if client.node:  # modules are found beside the script
        shutil.copy(HERE / client.script, folder / client.script)
        return ["node", str(folder / client.script), url]
    return [str(folder / "bin/python"), str(HERE / client.script), url]


def versions(client: Client, folder: Path) -> str:
    names = [package.split("[")[0] for package in client.packages if package != "zod"]
    if client.node:
        found = {name: json.loads((folder / "node_modules" / name / "package.json").read_text())["version"] for name in names}
    else:
        listed = subprocess.run([folder / "bin/pip", "list", "--format=json"], check=True, capture_output=True).stdout
        every = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(listed)}
        found = {name: every[name] for name in names}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def start_server(data_dir: Path) -> tuple[subprocess.Popen[str], str]:
    """`precis serve` over the demo, and over the same with a template that has tools."""
    tools = data_dir / "tools"
    tools.mkdir()
    for file in (ROOT / ".cache/demo").resolve().iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, tools / file.name)
    (tools / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    arguments = ["serve", str((ROOT / ".cache/demo").resolve()), str(tools), "--port", "0", "--data-dir", str(data_dir / "data")]
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "listens on " in line:
            return process, line.split("listens on ")[1].split()[0]
    raise SystemExit("the server did not start")


def wait_ready(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{url}/ready") as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(1)
    raise SystemExit("the server did not get ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(client.name for client in CLIENTS))
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache/clients")
    arguments = parser.parse_args()
    chosen = [client for client in CLIENTS if client.name in arguments.names or not arguments.names]
    arguments.environments.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as data_dir:
        process, url = start_server(Path(data_dir))
        try:
            wait_ready(url)
            print("| client | version | result |\n|---|---|---|")
            for client in chosen:
                folder = environment(client, arguments.environments)
                try:
                    done = subprocess.run(command(client, folder, url), capture_output=True, text=True, timeout=SECONDS)
                    output, status = done.stdout + done.stderr, done.returncode
                except subprocess.TimeoutExpired as error:
                    output, status = f"no end within {SECONDS} s: {(error.stdout or b'')[-2000:]!r}", 1
                good = [line.removeprefix("ok: ") for line in output.splitlines() if line.startswith("ok: ")]
                print(
                    f"| {client.name} | {versions(client, folder)} | {'' if status == 0 else 'FAILED after '}{'; '.join(good)} |",
                    flush=True,
                )
                if status:
                    failed.append(client.name)
                    print("\n".join(output.splitlines()[-30:]), file=sys.stderr)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
