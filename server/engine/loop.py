"""The engine's loop: what is loaded when, whose step is next, who is told.

    submit -> waiting -> (variant resident, request valid: pinned) -> its variant's scheduler -> steps -> last event

One thread computes (`run`), one step of one variant at a time; which variant's is `turns`' matter, what is in the step `scheduler`'s.
One thread loads (`run_loads`), so that other variants go on generating meanwhile. Where a load waits for memory that pinned variants
hold, nothing new is pinned until it has its turn: the pinned requests are finite, so every load comes to run, and the variant that it
loaded is pinned for those who waited for it before another load can evict it.
"""

import ctypes
import itertools
import logging
import queue
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from quantizers.errors import EngineUnavailable, Overloaded, PrecisError
from server.engine import executor
from server.engine.arrivals import Arrivals
from server.engine.executor import Decoder
from server.engine.generation import Generation
from server.engine.grammar import Compiled
from server.engine.interface import Failed, Finished, Request, Started, StepStats, Token, VariantKey, VariantSpec
from server.engine.messages import Reply, Stats, to_failed
from server.engine.outbox import Emit, Outbox
from server.engine.residents import Residents
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler, Step, Work
from server.engine.steps import Outcome, compute, translate
from server.engine.turns import Turns
from server.engine.twin import Twin
from server.engine.twins import Twins

logger = logging.getLogger(__name__)

_DEADLINE_SECONDS = 0.5  # between two looks at the deadlines of those who wait for a load


@dataclass(eq=False)
class _Job:
    call: int
    request: Request
    spec: VariantSpec
    arrival: float
    grammar: Future[Compiled] | None = None  # once its variant is resident, where it asks for one
    generation: Generation | None = None  # once pinned
    cancelled: bool = False

    @property
    def late(self) -> bool:
        deadline = self.request.deadline_seconds
        return deadline is not None and time.monotonic() > self.arrival + deadline


class Loop:
    """Everything that one worker does. `emit` is called from every thread, at times under the lock, and must not block."""

    def __init__(
        self, residents: Residents, emit: Emit, *, max_waiting: int, speculates: bool = False, twin_precision: str | None = None
    ) -> None:
        """`speculates`: tokens are drafted and verified, where that pays; by the variant of `twin_precision` too, where it is resident."""
        self._residents, self._emit, self._speculates = residents, emit, speculates
        self._outbox = Outbox(emit)
        self._twins = Twins(residents, twin_precision)
        self._lock = residents.changed
        self._arrivals = Arrivals(max_waiting)
        self._waiting: list[_Job] = []  # by arrival; not resident yet, or not pinned
        self._jobs: dict[VariantKey, dict[int, _Job]] = {}  # pinned, by call
        self._computing: set[int] = set()  # calls in the step under way
        self._interrupted = ctypes.c_int32()  # set where steps that go on by themselves shall come back
        self._turns: Turns[VariantKey] = Turns()
        self._closed = False
        self._loads: dict[VariantSpec, list[int]] = {}  # asked for and not answered yet -> the calls that wait for it
        self._operations: queue.SimpleQueue[VariantSpec | tuple[VariantKey, int] | None] = queue.SimpleQueue()
        self._nonfinite: dict[str, int] = {}
        self._preemptions: dict[str, int] = {}
        self._drafted: dict[str, int] = {}
        self._drafted_right: dict[str, int] = {}

    # Commands, from the thread that reads the socket.

    def submit(self, call: int, request: Request, spec: VariantSpec) -> None:
        """Queue a request; its events carry `call`. Where the queue is full, or the engine stops, its only event is Failed."""
        with self._lock:
            if self._closed:
                self._fail(call, EngineUnavailable("the engine is stopping: try again in a moment"))
                return
            try:
                self._arrivals.check(sum(1 for _ in self._unstarted()))
            except Overloaded as error:
                self._fail(call, error)
                return
            self._waiting.append(_Job(call, request, spec, time.monotonic()))
            self._admit()

    def cancel(self, call: int) -> None:
        """End a request at once, or after the step that computes it now; one that has ended already is left alone."""
        with self._lock:
            for job in [job for job in self._waiting if job.call == call]:
                self._waiting.remove(job)
                event = Finished(reason="cancelled", prompt_tokens=len(job.request.prompt_token_ids), completion_tokens=0)
                self._outbox.tell(call, event)
            for job in [job for job in self._pinned() if job.call == call]:
                job.cancelled = True
                if call in self._computing:
                    self._interrupted.value = 1
                else:
                    self._end(job, self._cancellation(job))

    def load(self, call: int, spec: VariantSpec) -> None:
        """Make `spec` resident and reply to `call`."""
        with self._lock:
            self._ask_for(spec).append(call)

    def unload(self, call: int, key: VariantKey) -> None:
        """Free `key` once it is idle and reply to `call`."""
        self._operations.put((key, call))

    def close(self) -> None:
        """End both threads: what runs fails before its next step, as does what waits."""
        with self._lock:
            self._closed = True
            self._interrupted.value = 1
            for job in self._waiting:
                self._fail(job.call, EngineUnavailable("the engine stopped before this request had its turn"))
            self._waiting.clear()
            for job in list(self._pinned()):
                job.cancelled = True
                if job.call not in self._computing:
                    self._end(job, self._cancellation(job))
            self._lock.notify_all()
        self._operations.put(None)

    def stats(self) -> StepStats:
        """Gauges as of now."""
        memory = self._residents.memory()
        with self._lock:
            running: dict[str, int] = {}
            waiting: dict[str, int] = {}
            for job in self._pinned():
                counts = running if job.generation is not None and job.generation.sequence.table is not None else waiting
                counts[str(job.spec.key)] = counts.get(str(job.spec.key), 0) + 1
            for job in self._waiting:
                waiting[str(job.spec.key)] = waiting.get(str(job.spec.key), 0) + 1
            return StepStats(
                running=running,
                waiting=waiting,
                kv_cache_usage={str(resident.key): self._usage(resident.key) for resident in memory.residents},
                memory=memory,
                nonfinite_logits=dict(self._nonfinite),
                evictions=dict(self._residents.evictions),
                preemptions=dict(self._preemptions),
                drafted=dict(self._drafted),
                drafted_right=dict(self._drafted_right),
            )

    def _usage(self, key: VariantKey) -> float:
        jobs = self._jobs.get(key)
        if not jobs:
            return 0.0
        scheduler = self._runner(next(iter(jobs.values()))).scheduler
        return 0.0 if scheduler is None else scheduler.usage

    def _pinned(self) -> Iterator[_Job]:
        return itertools.chain.from_iterable(jobs.values() for jobs in self._jobs.values())

    def _unstarted(self) -> Iterator[_Job]:
        yield from self._waiting
        yield from (job for job in self._pinned() if job.generation is not None and not job.generation.sequence.started)

    # Admission, under the lock.

    def _admit(self) -> None:
        """Give to its scheduler what can run, ask for the variants of the rest."""
        for job in list(self._waiting):
            runner = self._residents.runner(job.spec)
            if job not in self._waiting:
                continue  # a grammar was compiled at once, and those that wait were admitted on its account
            if runner is None:
                self._ask_for(job.spec)
            elif not self._residents.blocked and self._has_grammar(job, runner) and self._twins.claim(job.spec.key):
                self._waiting.remove(job)
                self._make_ready(job, runner)

    def _has_grammar(self, job: _Job, runner: Runner) -> bool:
        """Whether the job's grammar, if it has one, is compiled, or failed to be. Asks for it the first time; then it is admitted later."""
        if job.request.sampling.grammar is None:
            return True
        if job.grammar is None:
            job.grammar = runner.grammars.compile(job.request.sampling.grammar)
            job.grammar.add_done_callback(lambda _: self._readmit())
            return False
        return job.grammar.done()

    def _readmit(self) -> None:
        with self._lock:
            if not self._closed:
                self._admit()

    def _make_ready(self, job: _Job, runner: Runner) -> None:
        """Check and pin; whatever is wrong is the request's last event."""
        key, first = job.spec.key, job.spec.key not in self._jobs
        try:
            runner.check(job.request)
        except PrecisError as error:
            self._fail(job.call, error)
            return
        self._residents.pin(key)
        try:
            scheduler = self._scheduler(job, runner, idle=first)
            grammar = None if job.grammar is None else job.grammar.result()
            generation = Generation(job.call, job.request, runner, job.arrival, grammar)
        except Exception as error:  # noqa: BLE001 (translate() logs what is unknown)
            self._residents.unpin(key)
            self._fail(job.call, translate(error, f"request {job.request.id} on {key}"))
            return
        job.generation = generation
        self._jobs.setdefault(key, {})[job.call] = job
        if generation.needs_nothing:
            self._tell(job, generation.begin())
            self._end(job, generation.finished("length"))
        else:
            scheduler.add(generation.sequence)
            self._interrupted.value = 1
        self._lock.notify_all()

    def _scheduler(self, job: _Job, runner: Runner, *, idle: bool) -> Scheduler:
        """The scheduler of `runner`, with a cache that can hold the request; a cache that cannot is made anew while nobody uses it."""
        tokens = len(job.request.prompt_token_ids) + job.request.sampling.max_tokens
        if runner.scheduler is not None and idle and not runner.scheduler.fits(tokens):
            self._residents.close_cache(job.spec.key)
        if runner.scheduler is None:
            self._residents.open_cache(job.spec.key, tokens)
        runner.check_fits(job.request)
        assert runner.scheduler is not None, "an open cache has a scheduler"
        return runner.scheduler

    def _runner(self, job: _Job) -> Runner:
        runner = self._residents.runner(job.spec)
        assert runner is not None, "a pinned variant stays"
        return runner

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
        """Compute steps until closed. Raises where the device itself is lost."""
        while (key := self._next()) is not None:
            if self._step(key):
                self._emit(Stats(stats=self.stats()))

    def _next(self) -> VariantKey | None:
        """Whose step is next; waits until there is one. None once closed."""
        with self._lock:
            while not self._closed:
                self._twins.settle(self._jobs)
                self._admit()
                self._expire()
                if self._jobs:
                    return self._turns.next(self._jobs)
                self._outbox.flush()
                self._lock.wait(_DEADLINE_SECONDS if self._waiting else None)
            return None

    def _expire(self) -> None:
        """Fail those that have not begun and whose deadline has passed."""
        for job in [job for job in self._unstarted() if job.late]:
            error = Overloaded(
                f"request {job.request.id} did not begin within its deadline of {job.request.deadline_seconds:g} s: allow more time, or "
                "try again when fewer requests wait",
                code="deadline_exceeded",
                retry_after_seconds=self._arrivals.retry_after(1),
            )
            if job in self._waiting:
                self._waiting.remove(job)
                self._fail(job.call, error)
            else:
                self._end(job, error)

    def _step(self, key: VariantKey) -> bool:
        """One step of `key`, or several in a row; returns whether any request ended with it."""
        entered = time.perf_counter()
        with self._lock:
            jobs = self._jobs.get(key)
            if not jobs:
                return False  # cancelled meanwhile
            runner = self._runner(next(iter(jobs.values())))
            scheduler = runner.scheduler
            assert scheduler is not None, "pinned requests have a cache"
            generations = [self._generation(job) for job in jobs.values()] if self._speculates else []
            twin = self._twins.of(key, self._jobs) if generations else None
            for generation in generations:
                generation.draft(len(scheduler.running), runner.cost)
        began = time.perf_counter()
        drafts = {} if twin is None else self._draft(twin, generations, runner)
        drafting = time.perf_counter() - began
        with self._lock:
            for generation in generations:
                if drafts.get(generation.sequence.call):
                    generation.sequence.draft = drafts[generation.sequence.call]
            before = scheduler.preemptions
            step = scheduler.schedule(_steps_ahead(runner, [self._generation(job) for job in jobs.values()]))
            if step is None:
                return False  # cancelled while the twin drafted
            self._interrupted.value = 0
            self._count(self._preemptions, key, scheduler.preemptions - before)
            stepping = [jobs[work.sequence.call] for work in step.work]
            self._computing = {job.call for job in stepping}
            for job in stepping:
                self._tell(job, self._generation(job).begin())
            expected = None if step.reads or twin is not None else runner.cost.seconds(step.rows)
            self._outbox.before(None if expected is None else expected * (1 + step.ahead))
        began = time.perf_counter()
        try:
            outcomes = compute(runner.executor, step, {job.call: self._generation(job) for job in stepping}, self._interrupted)
        except torch.AcceleratorError as error:  # the device's context is beyond repair: the process must go, and is restarted
            for job in stepping:
                self._fail(job.call, translate(error, f"request {job.request.id} on {key}"))
            raise
        seconds = time.perf_counter() - began
        with self._lock:
            self._turns.charge(key, drafting + seconds)
            self._computing = set()
            ended = self._commit(scheduler, step, stepping, outcomes, twin, drafts)
        if not step.reads:
            gone = max((len(outcome) for outcome in outcomes if not isinstance(outcome, PrecisError)), default=1) if step.ahead else 1
            runner.cost.measured(step.rows, (time.perf_counter() - entered - drafting) / gone)  # with what lies between steps
        return ended

    def _commit(
        self,
        scheduler: Scheduler,
        step: Step,
        stepping: list[_Job],
        outcomes: list[Outcome],
        twin: Twin | None,
        drafts: Mapping[int, list[int]],
    ) -> bool:
        """Tell what a step brought; returns whether any request ended."""
        ended = 0
        for work, job, outcome in zip(step.work, stepping, outcomes, strict=True):
            if job.cancelled:
                self._end(job, self._cancellation(job))
            elif isinstance(outcome, PrecisError):
                if outcome.code == "nonfinite_logits":
                    self._count(self._nonfinite, job.spec.key, 1)
                    scheduler.retract(work.sequence)
                self._end(job, outcome)
            else:
                scheduler.advance(work)
                if work.draft:
                    self._verify(job, work, len(outcome) - 1, twin if work.sequence.call in drafts else None)
                if not work.samples:
                    continue
                events = list(self._generation(job).take(outcome))
                scheduler.confirm(work, max(0, len(outcome) - 1))  # also of a text that has ended: others may begin like it
                if not self._tell(job, events):
                    continue
            ended += 1
        return ended > 0

    def _draft(self, twin: Twin, generations: list[Generation], runner: Runner) -> dict[int, list[int]]:
        """The twin's drafts, by call, for those that the text itself gave none, where it pays. Without the lock."""
        wanting = [generation for generation in generations if generation.room > 0 and not generation.sequence.draft]
        length = twin.length(len(wanting), runner.cost) if wanting else 0
        try:
            return twin.draft(wanting, length) if length else {}
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 (nobody's text depends on a draft; translate() logs what is unknown)
            translate(error, "drafting by a twin")
            return {}

    def _verify(self, job: _Job, work: Work, right: int, twin: Twin | None) -> None:
        """Note how good a draft was, and whose."""
        if twin is not None:
            twin.verified(len(work.draft), right)
        self._count(self._drafted, job.spec.key, len(work.draft))
        self._count(self._drafted_right, job.spec.key, right)

    def _tell(self, job: _Job, events: Iterable[Started | Token | Finished]) -> bool:
        """Emit `events`; returns whether the last event was among them."""
        for event in events:
            if isinstance(event, Finished):
                self._end(job, event)
                return True
            self._outbox.tell(job.call, event)
        return False

    def _end(self, job: _Job, last: Finished | PrecisError) -> None:
        """Give back what a pinned job holds, then tell its last event."""
        jobs, runner = self._jobs[job.spec.key], self._runner(job)
        del jobs[job.call]
        if not jobs:
            del self._jobs[job.spec.key]
        sequence = self._generation(job).sequence
        if runner.scheduler is not None and not self._generation(job).needs_nothing:
            runner.scheduler.remove(sequence)
        self._residents.unpin(job.spec.key)
        self._arrivals.ended(time.monotonic())
        if isinstance(last, PrecisError):
            self._fail(job.call, last)
        else:
            self._outbox.tell(job.call, last)

    def _cancellation(self, job: _Job) -> Finished | PrecisError:
        if self._closed:
            return EngineUnavailable("the engine stopped while this request ran")
        return self._generation(job).finished("cancelled")

    @staticmethod
    def _generation(job: _Job) -> Generation:
        assert job.generation is not None, "a pinned job has its generation"
        return job.generation

    @staticmethod
    def _count(counts: dict[str, int], key: VariantKey, more: int) -> None:
        if more:
            counts[str(key)] = counts.get(str(key), 0) + more

    def _fail(self, call: int, error: PrecisError) -> None:
        failed: Failed = to_failed(error)
        self._outbox.tell(call, failed)


def _steps_ahead(runner: Runner, generations: list[Generation]) -> int:
    """How many steps may follow the next one before anybody is told of their tokens."""
    running = [generation for generation in generations if generation.sequence.table is not None]
    seconds = runner.cost.seconds(len(running)) if running else None
    if seconds is None or not isinstance(runner.executor, Decoder) or not all(generation.sampler.plain for generation in running):
        return 0
    return max(0, min(int(executor.AHEAD_SECONDS / max(seconds, 1e-3)) - 1, *(generation.room for generation in running)))
