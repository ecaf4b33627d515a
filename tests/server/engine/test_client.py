"""The client and its real worker process: streams, cancellation, sudden death, restart, stopping; no torch on this side."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from quantizers.errors import EngineUnavailable, InvalidInput, NotFound, OutOfMemory
from server.engine.client import EngineClient
from server.engine.interface import Engine, Finished, Request, Sampling, Started, Token, VariantSpec

LONG = 30_000  # tokens: far more than any test waits for


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    memory_budget_bytes: int | None = 1 << 30
    max_waiting: int = 8
    speculation: str = "lookup"
    twin_precision: str | None = None
    kv_dtype: str = "auto"


def run(test: Callable[[EngineClient], Awaitable[None]], options: Options | None = None, grace: float = 0.0) -> None:
    """`test` with a started engine, which is stopped afterwards whatever happens."""

    async def body() -> None:
        engine = EngineClient(options or Options(), threads=1)
        await engine.start()
        try:
            async with asyncio.timeout(60):
                await test(engine)
        finally:
            await engine.stop(grace)
        assert not engine.alive

    asyncio.run(body())


def request_of(spec: VariantSpec, name: str = "r", **sampling: object) -> Request:
    options = {"max_tokens": 5, "temperature": 0, **sampling}
    return Request(id=name, variant=spec.key, prompt_token_ids=(1, 2, 3), sampling=Sampling(**options))


async def collect(events: AsyncGenerator[Started | Token | Finished, None]) -> list[Started | Token | Finished]:
    return [event async for event in events]


def pid_of(engine: EngineClient) -> int:
    assert engine._worker is not None
    return engine._worker.pid


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_streams_of_several_requests_at_once(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        typed: Engine = engine
        info, again = await asyncio.gather(typed.load(specs["fp32"]), typed.load(specs["fp32"]))
        assert info is again
        assert typed.residents() == {specs["fp32"].key: info}
        await typed.load(specs["bf16"])
        assert set(typed.residents()) == {specs["fp32"].key, specs["bf16"].key}
        # The same id twice at once is the callers' affair.
        streams = await asyncio.gather(*(collect(engine.generate(request_of(specs[name]))) for name in ("fp32", "bf16", "fp32")))
        for started, *tokens, finished in streams:
            assert isinstance(started, Started)
            assert len(tokens) == 5
            assert isinstance(finished, Finished)
        texts = [[event.token_id for event in events if isinstance(event, Token)] for events in streams]
        assert texts[0] == texts[2], "only how much of the one prompt was read again may differ, and what was told together"
        stats = typed.stats()
        assert stats is not None
        assert stats.memory.used_bytes > 0
        assert stats.memory.budget_bytes == 1 << 30

    run(test)


def test_what_the_worker_refuses_is_raised_here(specs: dict[str, VariantSpec], tmp_path: Path) -> None:
    async def test(engine: EngineClient) -> None:
        with pytest.raises(NotFound, match="tiny@fp32 is not loaded: load it first"):
            await collect(engine.generate(request_of(specs["fp32"])))
        await engine.load(specs["fp32"])
        with pytest.raises(InvalidInput, match="context of 65536") as caught:
            await collect(engine.generate(request_of(specs["fp32"], max_tokens=10**6)))
        assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
        with pytest.raises(InvalidInput, match="64 bits"):
            await collect(engine.generate(request_of(specs["fp32"], seed=2**70)))
        with pytest.raises(NotFound, match=r"no config\.json"):
            await engine.load(specs["bf16"].model_copy(update={"checkpoint_dir": str(tmp_path)}))
        with pytest.raises(NotFound, match="not resident; resident are: tiny@fp32"):
            await engine.unload(specs["bf16"].key)
        await engine.unload(specs["fp32"].key)
        assert engine.residents() == {}
        with pytest.raises(NotFound, match="load it first"):
            await collect(engine.generate(request_of(specs["fp32"])))

    run(test)


def test_a_budget_that_holds_nothing(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        with pytest.raises(OutOfMemory, match="the budget is 1000 bytes"):
            await engine.load(specs["fp32"])

    run(test, Options(memory_budget_bytes=1000))


def test_closing_the_iterator_cancels_in_the_worker(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        await engine.load(specs["fp32"])
        async with aclosing(engine.generate(request_of(specs["fp32"], max_tokens=LONG))) as events:
            async for event in events:
                if isinstance(event, Token):
                    break
        assert engine._streams == {}
        began = time.monotonic()
        assert len(await collect(engine.generate(request_of(specs["fp32"])))) == 7
        assert time.monotonic() - began < 2

    run(test)


def test_cancelling_the_task_cancels_in_the_worker(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        await engine.load(specs["fp32"])
        running = asyncio.create_task(collect(engine.generate(request_of(specs["fp32"], max_tokens=LONG))))
        waiting = asyncio.create_task(collect(engine.generate(request_of(specs["fp32"], max_tokens=LONG))))
        await asyncio.sleep(0.1)
        for task in (waiting, running):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert len(await collect(engine.generate(request_of(specs["fp32"])))) == 7

    run(test)


def test_a_killed_worker_fails_what_runs_and_is_replaced(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        await engine.load(specs["fp32"])
        before = await collect(engine.generate(request_of(specs["fp32"])))
        streaming = engine.generate(request_of(specs["fp32"], max_tokens=LONG))
        assert isinstance(await anext(streaming), Started)
        assert isinstance(await anext(streaming), Token)
        waiting = asyncio.create_task(collect(engine.generate(request_of(specs["fp32"], max_tokens=LONG))))
        await asyncio.sleep(0)
        first = pid_of(engine)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="killed by SIGKILL; try again"):
            async for _ in streaming:
                pass
        with pytest.raises(EngineUnavailable, match="killed by SIGKILL"):
            await waiting
        assert not engine.alive
        assert (engine.residents(), engine.stats()) == ({}, None)
        with pytest.raises(EngineUnavailable, match="does not take requests"):
            await collect(engine.generate(request_of(specs["fp32"])))
        await until(lambda: engine.alive)
        assert engine.restarts == 1
        assert pid_of(engine) != first
        # Not loaded by anybody since: the request brings its folders along.
        assert await collect(engine.generate(request_of(specs["fp32"]))) == before
        assert list(engine.residents()) == [specs["fp32"].key]

    run(test)


def test_a_load_that_dies_is_told(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        os.kill(pid_of(engine), signal.SIGSTOP)  # so that it cannot answer first
        load = asyncio.create_task(engine.load(specs["fp32"]))
        await asyncio.sleep(0.05)
        os.kill(pid_of(engine), signal.SIGKILL)
        with pytest.raises(EngineUnavailable):
            await load
        await until(lambda: engine.alive)
        assert (await engine.load(specs["fp32"])).key == specs["fp32"].key

    run(test)


def test_a_worker_that_speaks_nonsense_is_replaced(specs: dict[str, VariantSpec]) -> None:
    async def test(engine: EngineClient) -> None:
        assert engine._worker is not None
        engine._worker.transport.write(b"\xff\xff\xff\xff nonsense")  # the worker closes; its successor is sound
        await until(lambda: engine.restarts == 1 and engine.alive)
        assert (await engine.load(specs["fp32"])).key == specs["fp32"].key

    run(test)


def test_stopping_lets_what_runs_end(specs: dict[str, VariantSpec]) -> None:
    async def body() -> None:
        engine = EngineClient(Options(), threads=1)
        await engine.start()
        await engine.load(specs["fp32"])
        running = asyncio.create_task(collect(engine.generate(request_of(specs["fp32"], max_tokens=200))))
        await until(lambda: bool(engine._streams))
        process = psutil.Process(pid_of(engine))
        stopping = asyncio.create_task(engine.stop(30))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailable, match="stopping"):
            await collect(engine.generate(request_of(specs["fp32"])))
        assert len(await running) == 202
        await stopping
        assert not process.is_running()
        assert engine.restarts == 0

    asyncio.run(body())


def test_stopping_without_grace_cuts_off(specs: dict[str, VariantSpec]) -> None:
    async def body() -> None:
        engine = EngineClient(Options(), threads=1)
        await engine.start()
        await engine.load(specs["fp32"])
        running = asyncio.create_task(collect(engine.generate(request_of(specs["fp32"], max_tokens=LONG))))
        await until(lambda: bool(engine._streams))
        began = time.monotonic()
        await engine.stop(0)
        assert time.monotonic() - began < 5
        with pytest.raises(EngineUnavailable):
            await running

    asyncio.run(body())


def test_a_worker_that_does_not_come_up_says_why() -> None:
    async def body() -> None:
        with pytest.raises(EngineUnavailable, match=r"exit status 2.*device 'cuda:99' is not on this machine"):
            await EngineClient(Options(device="cuda:99")).start()

    asyncio.run(body())


def test_no_torch_here_and_no_orphan_there() -> None:
    """A server that is killed takes its worker along, and never had torch."""
    program = textwrap.dedent(
        """
        import asyncio, sys
        from types import SimpleNamespace
        from server.engine.client import EngineClient
        async def main():
            settings = SimpleNamespace(
                device="cpu", memory_budget_bytes=None, max_waiting=1, speculation="off", twin_precision=None, kv_dtype="auto"
            )
            engine = EngineClient(settings, threads=1)
            await engine.start()
            assert "torch" not in sys.modules
            print(engine._worker.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        server.kill()
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        worker.wait(5)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE  # in a container nobody may reap it
