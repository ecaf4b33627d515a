"""Precis beside llama.cpp, OpenVINO GenAI and transformers: the demo model, the same bits and threads, taking turns in one run.

    python -m benchmarks.peers [--rounds 3] [--only llama.cpp,transformers] [--json FILE] [--plot FILE.svg]     (or: make bench)

Peers get environments of their own under .cache/peers, made here on first use; llama.cpp is compiled, which takes minutes. Every figure is
the best of the rounds. The tied embedding and output matrix has 8 bits in every quantized format, ours too (`-head8`).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from model_store.store import Store
from quantizers.recipe import parse_recipe
from server.quantizing import ensure_variant
from server.sources import DEMO, demo_file, open_demo

HERE = Path(__file__).parent
PEERS = HERE.parent.parent / ".cache" / "peers"
ENVIRONMENTS = {  # name -> what pip installs there
    "llama.cpp": ("llama-cpp-python==0.3.36", "numpy"),
    "OpenVINO": ("openvino-genai==2026.4.1.0", "numpy"),
}
PAIRS = {  # llama.cpp's format -> ours with the same bits
    "Q4_1": "rtn-w4g32z-head8",
    "Q4_0": "rtn-w4g32-head8",
    "Q8_0": "rtn-w8g32-head8",
    "BF16": "bf16",
}
CONTEXTS, PREFILL, BATCHES = (119, 1000), 512, (4, 8, 16)
STEPS = 48
PROMPTS = [np.random.default_rng(seed).integers(100, 40000, 1000).tolist() for seed in range(max(BATCHES))]


@dataclass
class Running:
    """A contender's process, and the best seconds of each work that it has done."""

    name: str
    format: str
    process: subprocess.Popen[str]
    best: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    library: str = ""

    @classmethod
    def start(cls, name: str, format_: str, python: Path, script: str, path: str, threads: int) -> Self:
        command = [str(python), str(HERE / script), path, str(threads)]
        root = {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(PEERS / f"{name}-{format_}.log").open("w"), text=True, env=root
        )
        return cls(name, format_, process)

    def run(self, key: str, work: str, **request: Any) -> None:
        """Raises SystemExit where the contender died, with where its output is."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"work": work} | request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.format} ended with status {self.process.wait()} at {key}: see {PEERS}/*.log")
        answer = json.loads(line)
        self.peak_bytes, self.library = answer["peak_bytes"], answer["library"]
        if answer["seconds"] is not None:
            self.best[key] = min(self.best.get(key, float("inf")), answer["seconds"])


def works() -> dict[str, tuple[int, dict[str, Any]]]:
    """Name -> tokens that it makes or reads, the request."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for context in CONTEXTS:
        found[f"decode, context {context}"] = (STEPS, {"work": "decode", "prompts": [PROMPTS[0][:context]], "steps": STEPS})
    found[f"prefill {PREFILL}"] = (PREFILL, {"work": "prefill", "prompts": [PROMPTS[0][:PREFILL]]})
    for batch in BATCHES:
        prompts = [prompt[:119] for prompt in PROMPTS[:batch]]
        found[f"batch of {batch}"] = (batch * STEPS, {"work": "decode", "prompts": prompts, "steps": STEPS})
    return found


def environment(name: str, console: Console) -> Path:
    """The Python of a peer's environment. Raises SystemExit where it cannot be made."""
    folder = PEERS / name
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        console.print(f"installing {', '.join(ENVIRONMENTS[name])} into {folder}; this can take minutes")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        options = os.environ | {"CMAKE_ARGS": " ".join(_cmake_options())}
        # pip's cache would give back what was compiled with other options.
        if subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-cache-dir", *ENVIRONMENTS[name]], env=options).returncode:
            raise SystemExit(f"{name} could not be installed: leave it out with --only")
        (folder / "done").touch()
    return python


def _cmake_options() -> list[str]:
    """Of llama.cpp: without its own programs, which take longer than it; and without AMX, with which it dies in a quantized format's
    first prompt."""
    options = ["-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_COMMON=OFF"]
    if torch.cpu.get_capabilities().get("amx_int8"):
        units = ("AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")
        options += ["-DGGML_NATIVE=OFF", *(f"-DGGML_{unit}=ON" for unit in units)]
    return options


def start_ours(demo: Path, slug: str, artifact: str, threads: int) -> Running:
    return Running.start("Precis", slug, Path(sys.executable), "ours.py", f"{demo}:{slug}:{artifact}", threads)


def start(options: argparse.Namespace, console: Console) -> list[Running]:
    """All contenders, ours first, none loaded yet."""
    threads = options.threads
    demo, artifacts = demo_variants(PAIRS.values(), console)
    running = [start_ours(demo, slug, artifact, threads) for slug, artifact in artifacts.items()]
    if "llama.cpp" in options.only:
        python = environment("llama.cpp", console)
        formats = PEERS / "gguf"
        if not (formats / "Q8_0.gguf").exists():
            formats.mkdir(exist_ok=True)
            subprocess.run(
                [str(python), str(HERE / "llamacpp.py"), "--convert", str(demo_file()), str(formats)], check=True, stderr=subprocess.DEVNULL
            )
        running += [Running.start("llama.cpp", name, python, "llamacpp.py", str(formats / f"{name}.gguf"), threads) for name in PAIRS]
        if "OpenVINO" in options.only:
            python = environment("OpenVINO", console)
            names = ("Q4_1", "Q4_0", "Q8_0")
            running += [Running.start("OpenVINO", name, python, "genai.py", str(formats / f"{name}.gguf"), threads) for name in names]
    if "transformers" in options.only:
        running.append(Running.start("transformers", "bf16", Path(sys.executable), "hf.py", str(demo), threads))
    return running


def demo_variants(recipes: Iterable[str], console: Console) -> tuple[Path, dict[str, str]]:
    """Folder of the demo checkpoint, and the folder of each recipe's artifact, empty for a baseline; made on first use."""
    with Store(PEERS / "data") as store, console.status("preparing the demo model") as status:
        checkpoint = open_demo(store, lambda stage, _: status.update(stage))
        found = {}
        for slug in recipes:
            status.update(f"quantizing {slug}")
            is_baseline = parse_recipe(slug).is_baseline
            found[slug] = "" if is_baseline else str(ensure_variant(store, DEMO, slug, device="cpu", progress=lambda _: None).dir)
        return checkpoint.dir, found


def measure(running: list[Running], rounds: int, console: Console) -> None:
    todo = works()
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(running) * (1 + rounds * (1 + len(todo))))
        for round_ in range(rounds + 1):  # the first warms up: files, clocks, libraries that compile on first use
            for key, (_, request) in ({"load": (0, {"work": "load"})} | (todo if round_ else {})).items():
                for contender in running:
                    contender.run(key, **request)
                    progress.advance(task)


def rows_of(running: list[Running]) -> list[dict[str, Any]]:
    tokens = {name: count for name, (count, _) in works().items()}
    return [
        {"name": one.name, "format": one.format, "library": one.library}
        | {f"{name}, tok/s": round(tokens[name] / one.best[name], 1) if name in one.best else None for name in tokens}
        | {"load, s": round(one.best["load"], 2), "peak, MB": round(one.peak_bytes / 1e6)}
        for one in running
    ]


def ratios_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours by llama.cpp's at the same bits; prefill and batches also by the best of its formats."""
    by = {(row["name"], row["format"]): row for row in rows}
    found = []
    for theirs, ours in PAIRS.items():
        mine, other = by.get(("Precis", ours)), by.get(("llama.cpp", theirs))
        if mine and other:
            row: dict[str, Any] = {"ours": ours, "llama.cpp": theirs}
            for key in [key for key in mine if key.endswith("tok/s")]:
                row[key.removesuffix(", tok/s")] = round(mine[key] / other[key], 2)
                if key.startswith("prefill"):
                    best = max(row[key] for row in rows if row["name"] == "llama.cpp")
                    row["prefill by its best"] = round(mine[key] / best, 2)
            row["16 streams by one"] = round(mine["batch of 16, tok/s"] / mine[f"decode, context {CONTEXTS[0]}, tok/s"], 2)
            found.append(row)
    return found


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(*[key for key in rows[0] if key != "library"], title=title, title_justify="left")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for key, value in row.items() if key != "library"))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a work, a bar a contender."""
    from matplotlib.figure import Figure

    keys = [key for key in rows[0] if key.endswith("tok/s")]
    figure = Figure(figsize=(3 * len(keys), 4.5), layout="constrained")
    labels = [f"{row['name']} {row['format']}" for row in rows]
    colors = {"Precis": "tab:blue", "llama.cpp": "tab:orange", "OpenVINO": "tab:green", "transformers": "tab:gray"}
    for index, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), index + 1)
        axes.barh(labels, [row[key] or 0 for row in rows], color=[colors[row["name"]] for row in rows])
        axes.invert_yaxis()
        axes.set(title=key)
        if index:
            axes.set_yticks([])
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), default=["llama.cpp", "OpenVINO", "transformers"], help="peers to run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    options = parser.parse_args()
    if unknown := set(options.only) - {*ENVIRONMENTS, "transformers"}:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}: there are {', '.join([*ENVIRONMENTS, 'transformers'])}")
    PEERS.mkdir(parents=True, exist_ok=True)
    console = Console(width=220)
    running = start(options, console)
    try:
        measure(running, options.rounds, console)
    finally:
        for contender in running:
            contender.process.kill()
            contender.process.wait()
    rows = rows_of(running)
    ratios = ratios_of(rows)
    show("tokens a second", rows, console)
    if ratios:
        show("ours by llama.cpp's", ratios, console)
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows, "ratios": ratios}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
