"""Tokens a second of one stream without drafts, with those of lookup, and with those of a twin too: text that repeats its prompt, and text
that does not, in alternating rounds.

    python benchmarks/speculation.py CHECKPOINT_FOLDER PRECISION [--artifact FOLDER] [--twin PRECISION [--twin-artifact FOLDER]]
                                     [--rounds N] [--tokens N]
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from server.engine.client import EngineClient
from server.engine.interface import Request, Sampling, Token, VariantKey, VariantSpec

CODE = "".join(f"def field_{name}(record):\n    return record['{name}']\n\n" for name in ("name", "age", "city", "street", "zip", "phone"))
PROMPTS = {
    "repeats its prompt": f"Here is a file:\n```\n{CODE}```\nHere is the same file again:\n```\n",
    "does not": "A short history of the city of Rome, from its founding to the present day:\n",
}


@dataclass(frozen=True)
class Options:
    speculation: str
    twin_precision: str | None = None
    kv_dtype: str = "auto"
    device: str = "cpu"
    memory_budget_bytes: int | None = 2 << 30
    max_waiting: int = 8


async def rate(engine: EngineClient, spec: VariantSpec, prompt: tuple[int, ...], tokens: int) -> float:
    """Tokens a second, from the first to the last."""
    sampling = Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
    first, count = 0.0, 0
    async for event in engine.generate(Request(id="r", variant=spec.key, prompt_token_ids=prompt, sampling=sampling)):
        if isinstance(event, Token):
            first = first or time.perf_counter()
            count += 1
    return (count - 1) / (time.perf_counter() - first)


def spec_of(checkpoint: Path, precision: str, artifact: Path | None) -> VariantSpec:
    key = VariantKey(model=checkpoint.name, precision=precision)
    return VariantSpec(key=key, checkpoint_dir=str(checkpoint), artifact_dir=None if artifact is None else str(artifact))


async def measure(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    spec = spec_of(arguments.checkpoint, arguments.precision, arguments.artifact)
    engines = {name: EngineClient(Options(name), threads=arguments.threads) for name in ("off", "lookup")}
    if arguments.twin is not None:
        engines["twin"] = EngineClient(Options("lookup", arguments.twin), threads=arguments.threads)
    try:
        for name, engine in engines.items():
            await engine.start()
            await engine.load(spec)
            if name == "twin":
                await engine.load(spec_of(arguments.checkpoint, arguments.twin, arguments.twin_artifact))
        before = dict.fromkeys(engines, (0, 0))
        for title, text in PROMPTS.items():
            prompt = tuple(tokenizer(text).input_ids)
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for round_ in range(arguments.rounds + 1):
                for name, engine in engines.items():
                    found = await rate(engine, spec, prompt, arguments.tokens)
                    if round_:  # the first warms up
                        rates[name].append(found)
            await asyncio.sleep(1.2)  # gauges come once a second
            plain = statistics.median(rates["off"])
            print(f"{title}: {plain:.1f} tokens/s without drafts")
            for name in [name for name in engines if name != "off"]:
                counts = drafts_of(engines[name])
                drafted, right = (now - then for now, then in zip(counts, before[name], strict=True))
                before[name] = counts
                ratios = sorted(with_ / without for with_, without in zip(rates[name], rates["off"], strict=True))
                found = statistics.median(rates[name])
                print(
                    f"    {name}: {found:.1f} tokens/s, {found / plain:.2f} times; of a round beside the one before it {ratios[0]:.2f} to "
                    f"{ratios[-1]:.2f}, median {statistics.median(ratios):.2f}; {right} of {drafted} drafts right"
                )
    finally:
        for engine in engines.values():
            await engine.stop(0)


def drafts_of(engine: EngineClient) -> tuple[int, int]:
    """Tokens drafted so far, and those that were right."""
    stats = engine.stats()
    return (0, 0) if stats is None else (sum(stats.drafted.values()), sum(stats.drafted_right.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("precision")
    parser.add_argument("--artifact", type=Path, help="folder of the variant's artifact, where it is no baseline")
    parser.add_argument("--twin", metavar="PRECISION", help="variant that drafts")
    parser.add_argument("--twin-artifact", type=Path, help="folder of its artifact")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
