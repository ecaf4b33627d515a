"""Order: which request runs next, what is loaded when, who is told.

    submit -> waiting -> (variant resident, request valid: pinned) -> ready -> running -> last event

One thread computes (`run`), one sequence at a time, in order of arrival among those that are ready. One thread loads (`run_loads`),
so that other variants go on generating meanwhile. Where a load waits for memory that pinned variants hold, nothing new is pinned
until it has its turn: the pinned requests are finite, so every load comes to run, and the variant that it loaded is pinned for those
who waited for it before another load can evict it.
"""

import bisect
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from quantizers.errors import EngineUnavailable, OutOfMemory, Overloaded, PrecisError
from server.engine.interface import Finished, Request, Started, StepStats, Token, VariantKey, VariantSpec
from server.engine.messages import Reply, Report, RequestEvent, Stats, to_failed
from server.engine.residents import Residents
from server.engine.runner import Runner

logger = logging.getLogger(__name__)

Emit = Callable[[Report], None]


@dataclass
class _Job:
    call: int
    request: Request
    spec: VariantSpec
    cancelled: threading.Event = field(default_factory=threading.Event)


class Scheduler:
    """Queues of one worker. `emit` is called from every thread, at times under the lock, and must not block."""

    def __init__(self, residents: Residents, emit: Emit, *, max_waiting: int) -> None:
        self._residents, self._emit, self._max_waiting = residents, emit, max_waiting
        self._lock = residents.changed
        self._waiting: list[_Job] = []  # by arrival; not resident yet, or not pinned
        self._ready: list[_Job] = []  # by arrival; pinned
        self._running: _Job | None = None
        self._runner: Runner | None = None
        self._closed = False
        self._loads: dict[VariantSpec, list[int]] = {}  # asked for and not answered yet -> the calls that wait for it
        self._operations: queue.SimpleQueue[VariantSpec | tuple[VariantKey, int] | None] = queue.SimpleQueue()
        self._nonfinite: dict[str, int] = {}

    # Commands, from the thread that reads the socket.

    def submit(self, call: int, request: Request, spec: VariantSpec) -> None:
        """Queue a request; its events carry `call`. Where the queue is full, or the engine stops, its only event is Failed."""
        with self._lock:
            if self._closed:
                self._fail(call, EngineUnavailable("the engine is stopping: try again in a moment"))
            elif len(self._waiting) + len(self._ready) >= self._max_waiting:
                self._fail(
                    call, Overloaded(f"{self._max_waiting} requests are waiting, which is all that may: try again later", code="queue_full")
                )
            else:
                self._waiting.append(_Job(call, request, spec))
                self._admit()

    def cancel(self, call: int) -> None:
        """End a request before its next step; one that has ended already is left alone."""
        with self._lock:
            if self._running is not None and self._running.call == call:
                self._running.cancelled.set()
            for job in [job for job in self._ready if job.call == call]:
                self._ready.remove(job)
                self._residents.unpin(job.spec.key)
                self._emit_cancelled(job)
            for job in [job for job in self._waiting if job.call == call]:
                self._waiting.remove(job)
                self._emit_cancelled(job)

    def load(self, call: int, spec: VariantSpec) -> None:
        """Make `spec` resident and reply to `call`."""
        with self._lock:
            self._ask_for(spec).append(call)

    def unload(self, call: int, key: VariantKey) -> None:
        """Free `key` once it is idle and reply to `call`."""
        self._operations.put((key, call))

    def close(self) -> None:
        """End both threads: what runs stops before its next step, what waits fails."""
        with self._lock:
            self._closed = True
            if self._running is not None:
                self._running.cancelled.set()
            for job in self._waiting + self._ready:
                self._fail(job.call, EngineUnavailable("the engine stopped before this request had its turn"))
            self._waiting.clear()
            self._ready.clear()
            self._lock.notify_all()
        self._operations.put(None)

    def stats(self) -> StepStats:
        """Gauges as of now."""
        memory = self._residents.memory()
        with self._lock:
            running = {} if self._running is None else {str(self._running.spec.key): 1}
            waiting: dict[str, int] = {}
            for job in self._waiting + self._ready:
                waiting[str(job.spec.key)] = waiting.get(str(job.spec.key), 0) + 1
            usage = {str(resident.key): 0.0 for resident in memory.residents}
            if self._running is not None and self._runner is not None:
                usage[str(self._running.spec.key)] = self._runner.cached_tokens / self._runner.max_model_len
            return StepStats(
                running=running,
                waiting=waiting,
                kv_cache_usage=usage,
                memory=memory,
                nonfinite_logits=dict(self._nonfinite),
                evictions=dict(self._residents.evictions),
            )

    # Admission, under the lock.

    def _admit(self) -> None:
        """Move to `ready` what can run, ask for the variants of the rest."""
        for job in list(self._waiting):
            runner = self._residents.runner(job.spec)
            if runner is None:
                self._ask_for(job.spec)
            elif not self._residents.blocked:
                self._waiting.remove(job)
                self._make_ready(job, runner)

    def _make_ready(self, job: _Job, runner: Runner) -> None:
        try:
            runner.check(job.request)
        except PrecisError as error:
            self._fail(job.call, error)
            return
        self._residents.pin(job.spec.key)
        bisect.insort(self._ready, job, key=lambda other: other.call)
        self._lock.notify_all()

    def _ask_for(self, spec: VariantSpec) -> list[int]:
        if spec not in self._loads:
            self._loads[spec] = []
            self._operations.put(spec)
        return self._loads[spec]

    # The loading thread.

    def run_loads(self) -> None:
        """Load and unload in order, until closed."""
        while (operation := self._operations.get()) is not None:
            if isinstance(operation, VariantSpec):
                self._load(operation)
            else:
                self._unload(*operation)

    def _load(self, spec: VariantSpec) -> None:
        try:
            self._residents.load(spec, on_ready=lambda: self._loaded(spec))
        except Exception as error:  # noqa: BLE001 (the others go on; translate() logs what is unknown)
            failure = translate(error, f"loading {spec.key}")
            with self._lock:
                for call in self._loads.pop(spec, []):
                    self._emit(Reply(call=call, failed=to_failed(failure)))
                for job in [job for job in self._waiting if job.spec == spec]:
                    self._waiting.remove(job)
                    self._fail(job.call, failure)
                self._admit()

    def _loaded(self, spec: VariantSpec) -> None:
        """Answer who waited for `spec`, and pin it for their requests."""
        info = self._residents.info(spec.key)
        self._emit(Stats(stats=self.stats()))  # before the replies: who is told that it is resident also finds it among the residents
        for call in self._loads.pop(spec, []):
            self._emit(Reply(call=call, resident=info))
        self._admit()

    def _unload(self, key: VariantKey, call: int) -> None:
        try:
            self._residents.unload(key)
        except Exception as error:  # noqa: BLE001 (as in _load)
            self._emit(Reply(call=call, failed=to_failed(translate(error, f"unloading {key}"))))
        else:
            self._emit(Stats(stats=self.stats()))
            self._emit(Reply(call=call))
        with self._lock:
            self._admit()

    # The computing thread.

    def run(self) -> None:
        """Run requests until closed. Raises where the device itself is lost."""
        while (job := self._next()) is not None:
            self._run(job)
            self._emit(Stats(stats=self.stats()))

    def _next(self) -> _Job | None:
        with self._lock:
            while not self._closed:
                self._admit()
                if self._ready:
                    self._running = self._ready.pop(0)
                    self._runner = self._residents.runner(self._running.spec)
                    return self._running
                self._lock.wait()
            return None

    def _run(self, job: _Job) -> None:
        key, runner = job.spec.key, self._runner
        assert runner is not None, "a ready request has its variant pinned"
        last: Finished | PrecisError
        try:
            last = self._generate(job, runner)
        except Exception as error:  # the model's code failing for one request fails that one alone
            last = translate(error, f"request {job.request.id} on {key}")
            if last.code == "nonfinite_logits":
                self._nonfinite[str(key)] = self._nonfinite.get(str(key), 0) + 1
            if isinstance(error, torch.AcceleratorError):
                self._fail(job.call, last)
                raise  # the device's context is beyond repair: the process must go, and is restarted
        with self._lock:
            self._running = self._runner = None
            self._residents.hold(key, "kv_cache", 0)
            self._residents.hold(key, "workspace", 0)
            self._residents.unpin(key)
        if isinstance(last, PrecisError):
            self._fail(job.call, last)
        else:
            self._emit(RequestEvent(call=job.call, event=last))

    def _generate(self, job: _Job, runner: Runner) -> Finished:
        """Emit all events but the last, which is returned."""
        events = runner.run(
            job.request,
            cancelled=job.cancelled.is_set,
            hold=lambda kind, count: self._residents.hold(job.spec.key, kind, count),
        )
        for event in events:
            if isinstance(event, Started | Token):
                self._emit(RequestEvent(call=job.call, event=event))
            elif event.reason == "cancelled" and self._closed:
                raise EngineUnavailable("the engine stopped while this request ran")
            else:
                return event
        raise AssertionError("a run ends with Finished")

    def _fail(self, call: int, error: PrecisError) -> None:
        self._emit(RequestEvent(call=call, event=to_failed(error)))

    def _emit_cancelled(self, job: _Job) -> None:
        event = Finished(reason="cancelled", prompt_tokens=len(job.request.prompt_token_ids), completion_tokens=0)
        self._emit(RequestEvent(call=job.call, event=event))


def translate(error: Exception, during: str) -> PrecisError:
    """`error` as one of the error tree: as it is, as OutOfMemory, or, logged with its traceback, as a failure of the model's code."""
    if isinstance(error, PrecisError):
        return error
    # torch's CPU allocator has no type of its own for this.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        logger.warning("out of memory %s: %s", during, error)
        return OutOfMemory(f"the device ran out of memory {during}: unload a variant, shorten the prompt or lower the memory budget")
    logger.error("%s failed", during, exc_info=error)
    return PrecisError(f"{during} failed in the model's code: {type(error).__name__}: {str(error)[:300]}", code="generation_failed")
