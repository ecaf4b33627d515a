"""The engine from the HTTP process: starts the worker, talks to it, starts it again when it dies. No torch here.

Every request has a call number on the connection; a reader task sorts what the worker reports to whoever waits for it. When the
connection ends, everybody who waits gets EngineUnavailable, and a new worker starts after a pause that doubles with each death in a
row. Variants are not loaded ahead then: the first request of each brings its folders along, and so loads it.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator

from quantizers.errors import EngineUnavailable, NotFound, PrecisError
from server.engine.frames import FrameError
from server.engine.interface import Failed, Finished, Request, ResidentInfo, Started, StepStats, Token, VariantKey, VariantSpec
from server.engine.messages import (
    Cancel,
    Command,
    Generate,
    Load,
    Reply,
    Report,
    RequestEvent,
    Stats,
    StepTokens,
    Unload,
    decode_report,
    encode,
    to_error,
)
from server.engine.process import EngineSettings, WorkerProcess

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5  # seconds before the first restart; doubled with each that follows, up to
_LAST_PAUSE = 30.0
_COUNTERS = ("nonfinite_logits", "evictions", "preemptions", "drafted", "drafted_right")  # fields of StepStats that only grow
_STEADY_SECONDS = 60.0  # a worker that lived this long did not die of how it started


class EngineClient:
    """An `Engine` whose work is done by a process of its own."""

    def __init__(self, settings: EngineSettings, *, threads: int | None = None, start_timeout_seconds: float = 120.0) -> None:
        """`threads` of a matrix product; None takes every core. The timeout is for a worker's imports and the device to open."""
        self._settings, self._threads, self._start_timeout = settings, threads, start_timeout_seconds
        self._worker: WorkerProcess | None = None  # None: starting, dead or stopped
        self._supervisor: asyncio.Task[None] | None = None
        self._calls = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Started | Token | Finished | PrecisError]] = {}
        self._replies: dict[int, asyncio.Future[ResidentInfo | None]] = {}
        self._loads: dict[VariantSpec, asyncio.Task[ResidentInfo]] = {}
        self._specs: dict[VariantKey, VariantSpec] = {}
        self._stats: StepStats | None = None
        # By workers that are gone.
        self._counted: dict[str, dict[str, int]] = {name: {} for name in _COUNTERS}
        self._restarts = 0
        self._stopping = False
        self._why = "it was not started"

    async def start(self) -> None:
        """Start the worker and wait until it takes commands. Raises EngineUnavailable, with its last words, where it does not come up."""
        assert self._supervisor is None, "an engine is started once"
        self._worker = await self._start_worker()
        self._supervisor = asyncio.create_task(self._supervise(self._worker), name="engine-supervisor")

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new requests, give running ones `grace_seconds` to end, end the worker."""
        self._stopping, self._why = True, "it is stopping"
        try:
            async with asyncio.timeout(grace_seconds):
                while self._streams or self._replies:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            logger.warning("%d requests did not end in %.1f s and are cut off", len(self._streams) + len(self._replies), grace_seconds)
        if self._supervisor is not None:
            if self._worker is not None:
                await self._worker.terminate()
            else:
                self._supervisor.cancel()  # between two workers
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._disconnect("it was stopped")

    async def generate(self, request: Request) -> AsyncGenerator[Started | Token | Finished, None]:
        """Events of one request; closing the iterator, or cancelling who iterates, cancels the request in the worker.

        Raises NotFound where the variant was never loaded here, EngineUnavailable where the worker is or goes away, and what the
        worker fails with.
        """
        spec = self._specs.get(request.variant)
        if spec is None:
            raise NotFound(f"{request.variant} is not loaded: load it first", param="model")
        call = next(self._calls)
        events: asyncio.Queue[Started | Token | Finished | PrecisError] = asyncio.Queue()
        self._send(Generate(call=call, request=request, spec=spec))
        self._streams[call] = events
        try:
            while True:
                event = await events.get()
                if isinstance(event, PrecisError):
                    self._streams.pop(call, None)
                    raise event
                if isinstance(event, Finished):
                    self._streams.pop(call, None)
                    yield event
                    return
                yield event
        finally:
            if self._streams.pop(call, None) is not None and self._worker is not None:
                self._send(Cancel(call=call))

    async def load(self, spec: VariantSpec) -> ResidentInfo:
        """Load where not resident yet; concurrent calls for one variant share one load, which goes on if its callers leave."""
        task = self._loads.get(spec)
        if task is None:
            task = self._loads[spec] = asyncio.create_task(self._load(spec), name=f"load {spec.key}")
            task.add_done_callback(lambda done: self._load_ended(spec, done))
        return await asyncio.shield(task)

    async def _load(self, spec: VariantSpec) -> ResidentInfo:
        info = await self._ask(Load(call=next(self._calls), spec=spec))
        assert info is not None, "the worker answers Load with the resident"
        self._specs[spec.key] = spec
        return info

    def _load_ended(self, spec: VariantSpec, task: asyncio.Task[ResidentInfo]) -> None:
        del self._loads[spec]
        if not task.cancelled() and task.exception() is not None:
            logger.info("loading %s failed: %s", spec.key, task.exception())  # also marks it as retrieved, should all callers have left

    async def unload(self, key: VariantKey) -> None:
        """Free the variant once it is idle. Raises NotFound where it is not resident."""
        self._specs.pop(key, None)
        await self._ask(Unload(call=next(self._calls), key=key))

    def residents(self) -> dict[VariantKey, ResidentInfo]:
        """As last reported by the worker; empty while there is none. Never waits."""
        return {} if self._stats is None else {info.key: info for info in self._stats.memory.residents}

    def stats(self) -> StepStats | None:
        """As last reported by the worker, None while there is none; counters go on over restarts. Never waits."""
        if self._stats is None:
            return None
        return self._stats.model_copy(
            update={name: _sum(before, getattr(self._stats, name)) for name, before in self._counted.items()},
        )

    @property
    def alive(self) -> bool:
        """Whether requests reach a worker now."""
        return self._worker is not None and not self._stopping

    @property
    def restarts(self) -> int:
        """How often a worker had to be replaced."""
        return self._restarts

    async def _ask(self, command: Load | Unload) -> ResidentInfo | None:
        reply: asyncio.Future[ResidentInfo | None] = asyncio.get_running_loop().create_future()
        self._send(command)
        self._replies[command.call] = reply
        try:
            return await reply
        finally:
            self._replies.pop(command.call, None)

    def _send(self, command: Command) -> None:
        if self._worker is None or (self._stopping and not isinstance(command, Cancel)):
            raise EngineUnavailable(f"the engine does not take requests: {self._why}; try again in a few seconds")
        self._worker.transport.write(encode(command))

    async def _start_worker(self) -> WorkerProcess:
        return await WorkerProcess.start(self._settings, threads=self._threads, timeout_seconds=self._start_timeout)

    async def _supervise(self, worker: WorkerProcess) -> None:
        """Serve one worker after the other until stopped."""
        pause = _FIRST_PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            await self._serve(worker)
            if self._stopping:
                return
            if asyncio.get_running_loop().time() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            while self._worker is None:
                self._restarts += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
                try:
                    worker = self._worker = await self._start_worker()
                except EngineUnavailable as error:
                    self._why = error.message
                    logger.error("%s; next try in %.1f s", error.message, pause)

    async def _serve(self, worker: WorkerProcess) -> None:
        """Distribute what `worker` reports until it ends, then tell everybody who waits."""
        broken = None
        try:
            await worker.frames.serve(lambda body: self._distribute(decode_report(body)))
        except FrameError as error:
            broken = str(error)
            logger.error("the engine's process is not understood and is ended: %s", error)
        death = await worker.finish()
        self._worker = None
        if not self._stopping:
            logger.error("the engine's process ended: %s", death)
        self._disconnect(broken or death)

    def _distribute(self, report: Report) -> None:
        if isinstance(report, RequestEvent):
            stream = self._streams.get(report.call)
            if stream is not None:  # else its caller has left, and the worker did not know yet
                stream.put_nowait(to_error(report.event) if isinstance(report.event, Failed) else report.event)
        elif isinstance(report, StepTokens):
            together = Counter(call for call, _ in report.tokens)
            for call, token_id in report.tokens:
                if (stream := self._streams.get(call)) is not None:
                    stream.put_nowait(Token(token_id=token_id, together=together[call]))
        elif isinstance(report, Reply):
            reply = self._replies.get(report.call)
            if reply is None or reply.done():
                return
            if report.failed is None:
                reply.set_result(report.resident)
            else:
                reply.set_exception(to_error(report.failed))
        elif isinstance(report, Stats):
            self._stats = report.stats
        else:
            raise FrameError("a second hello")

    def _disconnect(self, why: str) -> None:
        """Fail everybody who waits; what a worker held is gone, what it counted is kept."""
        self._why = why
        if self._stats is not None:
            self._counted = {name: _sum(before, getattr(self._stats, name)) for name, before in self._counted.items()}
        self._stats = None
        message = f"the engine ended while it worked on this request: {why}; try again in a few seconds"
        for stream in self._streams.values():
            stream.put_nowait(EngineUnavailable(message))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineUnavailable(message))


def _sum(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    return {key: first.get(key, 0) + second.get(key, 0) for key in first.keys() | second.keys()}
