"""Tokens a second of one stream with and without drafts, in alternating rounds: text that repeats its prompt, and text that does not.

python benchmarks/speculation.py CHECKPOINT_FOLDER PRECISION [--rounds N] [--tokens N]
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


async def measure(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    key = VariantKey(model=arguments.checkpoint.name, precision=arguments.precision)
    spec = VariantSpec(key=key, checkpoint_dir=str(arguments.checkpoint), artifact_dir=None)
    engines = {name: EngineClient(Options(name), threads=arguments.threads) for name in ("off", "lookup")}
    try:
        for engine in engines.values():
            await engine.start()
            await engine.load(spec)
        for title, text in PROMPTS.items():
            prompt = tuple(tokenizer(text).input_ids)
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for round_ in range(arguments.rounds + 1):
                for name, engine in engines.items():
                    found = await rate(engine, spec, prompt, arguments.tokens)
                    if round_:  # the first warms up
                        rates[name].append(found)
            off, on = (statistics.median(rates[name]) for name in ("off", "lookup"))
            await asyncio.sleep(1.2)  # gauges come once a second
            stats = engines["lookup"].stats()
            drafted, right = (0, 0) if stats is None else (sum(stats.drafted.values()), sum(stats.drafted_right.values()))
            print(f"{title}: {off:.1f} tokens/s without, {on:.1f} with drafts, {on / off:.2f} times; {right} of {drafted} right so far")
    finally:
        for engine in engines.values():
            await engine.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("precision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
