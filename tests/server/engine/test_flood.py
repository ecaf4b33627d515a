"""A flood at the worker: more clients than may wait, half of whom hang up at random moments. Everybody is answered, nothing is left."""

import asyncio
import random
import statistics
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass

from quantizers.errors import Overloaded
from server.engine.client import EngineClient
from server.engine.interface import Finished, Request, Sampling, StepStats, Token, VariantSpec
from server.engine.scheduler import Limits

CLIENTS = 200
QUEUE = 64
SEQUENCES = Limits.sequences  # that run at once
# By which the flood may slow the engine down against a few clients who wait their turn: cancellations in the middle of steps, prompts that
# were read for nobody, 200 clients in the same process as whoever measures.
SLOWER = 3.0


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    memory_budget_bytes: int | None = 1 << 28
    max_waiting: int = QUEUE
    speculation: str = "lookup"
    twin_precision: str | None = None
    kv_dtype: str = "auto"


class Flood:
    """Clients of one engine, by what became of them."""

    def __init__(self, engine: EngineClient, spec: VariantSpec) -> None:
        self._engine, self._spec = engine, spec
        self.outcomes: Counter[str] = Counter()
        self.first_token_seconds: list[float] = []
        self.retry_after: list[float] = []

    async def client(self, number: int, *, patient: bool = False) -> None:
        """Half of them hang up at some moment, unless they are `patient`."""
        choose = random.Random(number)
        await asyncio.sleep(0 if patient else choose.random() * 0.5)
        prompt = tuple(choose.choices(range(5), k=choose.choice([3, 40, 700])))
        length = choose.randint(1, 30)
        request = Request(
            id=f"r{number}", variant=self._spec.key, prompt_token_ids=prompt, sampling=Sampling(max_tokens=length, seed=number)
        )
        leaves_after = choose.randint(0, length) if number % 2 and not patient else None
        try:
            async with asyncio.timeout(choose.random() * 2 if number % 4 == 1 and not patient else None):
                self.outcomes[await self._read(request, length, leaves_after)] += 1
        except TimeoutError:
            self.outcomes["left"] += 1
        except Overloaded as error:
            self.outcomes["refused"] += 1
            assert error.retry_after_seconds is not None
            self.retry_after.append(error.retry_after_seconds)

    async def _read(self, request: Request, length: int, leaves_after: int | None) -> str:
        clock = asyncio.get_running_loop().time
        began, tokens = clock(), 0
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Token):
                    tokens += 1
                    if tokens == 1:
                        self.first_token_seconds.append(clock() - began)
                if isinstance(event, Finished):
                    assert (event.completion_tokens, event.prompt_tokens) == (tokens, len(request.prompt_token_ids))
                    assert tokens == length
                    return "finished"
                if tokens == leaves_after:
                    return "left"
        raise AssertionError("a stream ended without its last event")


async def settled(engine: EngineClient) -> StepStats:
    """The worker's numbers once it has a cache and nothing to do; an answer may arrive before the report that follows it."""
    while (stats := engine.stats()) is None or stats.running or stats.waiting or not _cache_bytes(stats):
        await asyncio.sleep(0.05)
    return stats


def _cache_bytes(stats: StepStats) -> int:
    return sum(resident.bytes.get("kv_cache", 0) for resident in stats.memory.residents)


def test_a_flood_ends_with_everybody_answered_and_nothing_left(specs: dict[str, VariantSpec]) -> None:
    async def test() -> None:
        engine = EngineClient(Options(), threads=1)
        await engine.start()
        try:
            await engine.load(specs["bf16"])
            flood, calm = (Flood(engine, specs["bf16"]) for _ in range(2))
            await flood.client(0)  # the cache is made
            began = time.monotonic()
            await asyncio.gather(*(calm.client(CLIENTS + number, patient=True) for number in range(SEQUENCES)))
            seconds_each = (time.monotonic() - began) / SEQUENCES
            flood.first_token_seconds.clear()
            async with asyncio.timeout(30):
                before = await settled(engine)
            async with asyncio.timeout(120):
                await asyncio.gather(*(flood.client(number) for number in range(1, CLIENTS)))
                after = await settled(engine)
            assert sum(flood.outcomes.values()) == CLIENTS
            assert flood.outcomes["finished"] >= 20
            assert flood.outcomes["left"] >= 20
            assert after.kv_cache_usage == {str(specs["bf16"].key): 0.0}, "a block is held by nobody's request"
            assert after.memory.reserved_bytes == before.memory.reserved_bytes
            assert all(1 <= seconds <= 60 for seconds in flood.retry_after)
            # 64 that wait and 32 that run are all that can be before a request that was taken.
            bound = SLOWER * (QUEUE + SEQUENCES) * seconds_each
            p99 = statistics.quantiles(flood.first_token_seconds, n=100)[98]
            print(f"time to first token of accepted requests: p99 {p99:.2f} s, bound {bound:.2f} s")
            assert p99 < bound
            assert engine.restarts == 0
            assert not engine._streams
        finally:
            await engine.stop(0)

    asyncio.run(test())
