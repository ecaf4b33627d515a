"""What HTTP, tokenization, sampling and scheduling add to a step: one stream's decode speed at three depths, taking turns in one run.

    python -m benchmarks.serving [RECIPE ...] [--rounds 5] [--tokens 128] [--json FILE]

step: the native step and the choice of the largest logit, in a process of their own. engine: a request to the engine's worker process.
HTTP: `precis serve` and a client that reads the stream and counts its tokens. official client: the same through the `openai` package, whose
own work for each token is on the same two cores. Rates are medians over the rounds, and so are the ratios, each taken within its round:
what else the machine does then falls on both.
"""

import argparse
import asyncio
import http.client
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from benchmarks.peers.__main__ import PEERS, PROMPTS, demo_variants, start_ours
from benchmarks.throughput import Settings, decode_speed
from server.engine.client import EngineClient
from server.engine.interface import VariantKey, VariantSpec
from server.sources import DEMO

CONTEXT = 119


class Http:
    """A server with the variants resident, and a client."""

    def __init__(self, recipes: list[str]) -> None:
        command = [
            sys.executable,
            "-m",
            "server.cli",
            "serve",
            DEMO,
            "--recipes",
            *recipes,
            "--port",
            "0",
            "--data-dir",
            str(PEERS / "data"),
            "--speculation",
            "off",  # as the engine's settings here: what is measured is a token's way, not guesses
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"listens on (http://\S+)", line):
                self._address = urlsplit(found[1]).netloc
                self._client = OpenAI(base_url=f"{found[1]}/v1", api_key="none", timeout=300)
                return
        raise SystemExit(f"precis serve ended with status {self._process.wait()}")

    def decode(self, recipe: str, tokens: int) -> float:
        """Tokens a second between the first and the last that the client sees, each an event of its own."""
        connection = http.client.HTTPConnection(self._address, timeout=300)
        connection.request("POST", "/v1/completions", json.dumps(request(recipe, tokens)), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {answer.read().decode()}")
        first = last = 0.0
        made, rest = 0, b""
        while piece := answer.read1():
            *events, rest = (rest + piece).split(b"\n\n")
            now = time.perf_counter()
            for event in events:
                body = json.loads(event.removeprefix(b"data: ")) if event != b"data: [DONE]" else {}
                if body.get("choices"):
                    first, last = first or now, now
                if body.get("usage"):
                    made = body["usage"]["completion_tokens"]
        connection.close()
        return (made - 1) / (last - first)

    def decode_officially(self, recipe: str, tokens: int) -> float:
        """`decode` through the official client."""
        body = request(recipe, tokens)
        stream = self._client.completions.create(
            **{key: value for key, value in body.items() if key != "ignore_eos"}, extra_body={"ignore_eos": True}
        )
        first = last = 0.0
        made = 0
        for chunk in stream:
            if chunk.choices:
                last = time.perf_counter()
                first = first or last
            if chunk.usage is not None:
                made = chunk.usage.completion_tokens
        return (made - 1) / (last - first)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def request(recipe: str, tokens: int) -> dict[str, Any]:
    """A streamed completion of exactly `tokens` tokens after a prompt that no cache knows."""
    return {
        "model": f"{DEMO}@{recipe}",
        "prompt": [random.randrange(100, 40000) for _ in range(CONTEXT)],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


async def measure(options: argparse.Namespace) -> list[dict[str, float | str]]:
    demo, artifacts = demo_variants(options.recipes, Console())
    engine = EngineClient(Settings(device="cpu"), threads=options.threads)
    await engine.start()
    server = Http(options.recipes)
    rounds: dict[str, list[dict[str, float]]] = {}
    try:
        for slug in options.recipes:
            key = VariantKey(model=DEMO, precision=slug)
            info = await engine.load(VariantSpec(key=key, checkpoint_dir=str(demo), artifact_dir=artifacts[slug] or None))
            step = start_ours(demo, slug, artifacts[slug], options.threads)
            step.run("load", "load")
            server.decode(slug, options.tokens)  # loads it
            for _ in range(options.rounds):
                step.run("step", "decode", prompts=[PROMPTS[0][:CONTEXT]], steps=options.tokens)
                rates = {"step": options.tokens / step.best.pop("step")}
                rates["engine"] = await decode_speed(
                    engine, key, info, 1, argparse.Namespace(prompt=CONTEXT, tokens=options.tokens, temperature=0, top_p=1)
                )
                rates["HTTP"] = await asyncio.to_thread(server.decode, slug, options.tokens)
                rates["official client"] = await asyncio.to_thread(server.decode_officially, slug, options.tokens)
                rates |= {"HTTP by step": rates["HTTP"] / rates["step"], "HTTP by engine": rates["HTTP"] / rates["engine"]}
                rounds.setdefault(slug, []).append(rates)
            step.process.kill()
            step.process.wait()
    finally:
        server.close()
        await engine.stop(0)
    return [
        {"recipe": slug} | {name: float(f"{median(each[name] for each in found):.4g}") for name in found[0]}
        for slug, found in rounds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["rtn-w4g32-head8", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(measure(options))
    table = Table(*rows[0], title="one stream, tokens a second")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
