"""Aggregate decode speed of the engine at several numbers of concurrent streams, through its client and its worker process.

    python benchmarks/throughput.py CHECKPOINT_DIR [PRECISION] [--streams 1,2,4,8,16,24] [--tokens 64] [--json] [--plot FILE.svg]

Every stream has a prompt of its own, so that nothing comes from the prefix cache. The clock runs from the moment at which every stream
has its first token to the end of the first that ends, so only steps in which all streams decode are counted. The best of the rounds is
reported, since whatever else runs on the machine only slows them down; the rounds of all sizes alternate.
"""

import argparse
import asyncio
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from server.engine.client import EngineClient
from server.engine.interface import Request, ResidentInfo, Sampling, Token, VariantKey, VariantSpec


@dataclass(frozen=True)
class Settings:
    device: str = "auto"
    memory_budget_bytes: int | None = None
    max_waiting: int = 64
    speculation: str = "off"  # what is measured is what streams share, not what is guessed
    twin_precision: str | None = None
    kv_dtype: str = "auto"


@dataclass(frozen=True)
class Speed:
    streams: int
    tokens_per_second: float  # over all streams
    times_one_stream: float
    milliseconds_per_step: float


async def decode_speed(engine: EngineClient, key: VariantKey, info: ResidentInfo, streams: int, options: argparse.Namespace) -> float:
    """Tokens a second over all streams while all of them decode."""
    clock = asyncio.get_running_loop().time
    times: list[list[float]] = [[] for _ in range(streams)]

    async def stream(index: int) -> None:
        prompt = tuple(random.choices(range(info.vocab_size), k=options.prompt))
        sampling = Sampling(max_tokens=options.tokens, temperature=options.temperature, top_p=options.top_p, ignore_eos=True)
        async for event in engine.generate(Request(id=str(index), variant=key, prompt_token_ids=prompt, sampling=sampling)):
            if isinstance(event, Token):
                times[index].append(clock())

    await asyncio.gather(*(stream(index) for index in range(streams)))
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    if end <= begin:
        raise SystemExit(f"{streams} streams of {options.tokens} tokens never decode all at once: ask for more --tokens")
    return sum(begin < moment <= end for own in times for moment in own) / (end - begin)


async def measure(options: argparse.Namespace) -> tuple[ResidentInfo, list[Speed]]:
    """Load the variant and measure every number of streams."""
    engine = EngineClient(Settings(device=options.device), threads=options.threads)
    await engine.start()
    try:
        key = VariantKey(model=options.checkpoint.name, precision=options.precision)
        artifact = None if options.artifact is None else str(options.artifact)
        info = await engine.load(VariantSpec(key=key, checkpoint_dir=str(options.checkpoint), artifact_dir=artifact))
        best = dict.fromkeys(options.streams, 0.0)
        for _ in range(options.rounds):
            for streams in options.streams:
                best[streams] = max(best[streams], await decode_speed(engine, key, info, streams, options))
    finally:
        await engine.stop(0)
    one = best[min(best)] / min(best)
    return info, [Speed(streams, speed, speed / one, 1000 * streams / speed) for streams, speed in best.items()]


def table_of(name: str, info: ResidentInfo, speeds: list[Speed]) -> Table:
    kernels = ", ".join(sorted(info.kernels))
    table = Table("streams", "tokens/s", "times one stream", "ms a step", title=f"{name} on {info.device} ({kernels})")
    for speed in speeds:
        table.add_row(
            str(speed.streams), f"{speed.tokens_per_second:.0f}", f"{speed.times_one_stream:.2f}", f"{speed.milliseconds_per_step:.1f}"
        )
    return table


def plot(name: str, speeds: list[Speed], path: Path) -> None:
    """Tokens a second over streams, beside what a single stream's speed times their number would be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    streams = [speed.streams for speed in speeds]
    axes.plot(streams, [speed.tokens_per_second for speed in speeds], marker="o", label="measured")
    axes.plot(streams, [count * speeds[0].tokens_per_second / streams[0] for count in streams], linestyle=":", label="one stream times n")
    axes.set(xlabel="concurrent streams", ylabel="tokens/s over all streams", title=name, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode speed of the engine at several numbers of concurrent streams.")
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("precision", nargs="?", default="bf16", help="slug of a recipe; one that is no baseline needs --artifact")
    parser.add_argument("--artifact", type=Path, help="folder of the variant's artifact")
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8, 16, 24])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each stream generates")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of a matrix product; default: every core")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="write an SVG or PNG here")
    options = parser.parse_args()
    info, speeds = asyncio.run(measure(options))
    name = f"{options.checkpoint.name}@{options.precision}"
    if options.json:
        print(json.dumps({"variant": name, "device": info.device, "kernels": info.kernels, "speeds": [asdict(speed) for speed in speeds]}))
    else:
        Console().print(table_of(name, info, speeds))
    if options.plot is not None:
        plot(name, speeds, options.plot)


if __name__ == "__main__":
    main()
