"""Which sequences of one variant compute what in the next step. Plain data: no tensor, no thread, no clock of its own.

    add -> waiting -> running (its prompt's blocks are held) -> finish
              ^-------- preempted: blocks given up, computed again later

A step is one ragged batch under a budget of tokens: first one token for every sequence that generates, then chunks of the prompts
that are being read, then new sequences. Order is by priority, deadline and arrival, everywhere: who comes first in it is never
preempted for another, so that the first always gets on and, with equal priorities, nobody starves.

A prompt that several sequences have in common, as the choices of one request do, is read once: the others wait until it is, and then
hold the same blocks, each of which is copied when one of them writes into it.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from server.engine.blocks import BlockPool, BlockTable, OutOfBlocks

_FIRST_GUESS = 64.0  # tokens that an answer is expected to have, before any has ended
_GUESS_WEIGHT = 0.1  # of the newest answer in the running mean


@dataclass(frozen=True)
class Limits:
    """Of one step."""

    step_tokens: int = 512  # enough for full throughput of matrix products
    mixed_tokens: int = 128  # of prompts, in a step that also generates: what a running stream may be held up by
    sequences: int = 32
    scored_tokens: int = 512  # of a prompt whose every position needs logits


@dataclass(eq=False)
class Sequence:
    """One request as far as scheduling sees it. `tokens` is the prompt and, after it, what was generated."""

    call: int
    tokens: list[int]
    max_tokens: int
    arrival: float  # seconds, any clock
    salt: str = ""
    priority: int = 0  # higher goes first
    deadline: float = math.inf  # on the clock of `arrival`; one that has not begun by then is dropped
    scored: int | None = None  # prompt positions whose logits were used, where those are wanted
    prompt_tokens: int = field(init=False)
    draft: list[int] = field(default_factory=list)  # tokens that may follow, to be verified by the next step
    table: BlockTable | None = None  # while it runs
    computed: int = 0  # leading tokens whose keys and values are in its blocks
    cached: int = 0  # of the prompt, found in the cache when it began
    started: bool = False

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def scores(self) -> bool:
        """Whether prompt positions still wait for their logits to be used."""
        return self.scored is not None and self.scored < self.prompt_tokens - 1

    def begins_with(self, tokens: list[int]) -> bool:
        return self.tokens[: len(tokens)] == tokens

    @property
    def order(self) -> tuple[int, float, float, int]:
        return (-self.priority, self.deadline, self.arrival, self.call)


@dataclass(frozen=True)
class Work:
    """`count` tokens of a sequence from position `start` on, and `draft` behind them; logits are wanted from position `logits_from` on.

    `ahead`: so many steps may follow at once, each on the token that the one before chose; there are blocks for them.
    """

    sequence: Sequence
    start: int
    count: int
    logits_from: int
    draft: tuple[int, ...] = ()
    ahead: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def rows(self) -> int:
        """Tokens that it computes."""
        return self.count + len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether a token follows: everything known of the sequence is computed then."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True)
class Step:
    """`copies` are (src, dst) blocks to copy, in this order, before anything is written."""

    work: tuple[Work, ...]
    copies: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Tokens that it computes."""
        return sum(work.rows for work in self.work)

    @property
    def reads(self) -> bool:
        """Whether more than the newest known token of a sequence is in it, as while a prompt is read."""
        return any(work.count > 1 for work in self.work)

    @property
    def ahead(self) -> int:
        """Steps that may follow at once, of all its sequences alike."""
        return self.work[0].ahead


def _prompt_is_read(sequence: Sequence) -> bool:
    return sequence.computed >= sequence.prompt_tokens


class Scheduler:
    """The sequences of one variant over one pool of blocks."""

    def __init__(self, pool: BlockPool, block_size: int, limits: Limits) -> None:
        """`limits.sequences` may not exceed its `step_tokens`: each that generates has a token in every step."""
        assert 0 < limits.sequences <= limits.step_tokens, "a step holds a token of every sequence"
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._pool, self._size, self._limits = pool, block_size, limits
        self._guess = _FIRST_GUESS

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def usage(self) -> float:
        """Share of the pool that sequences hold, 0 to 1."""
        return self._pool.used / self._pool.total

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def total_blocks(self) -> int:
        return self._pool.total

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this length could ever run here."""
        return self._blocks(tokens) <= self._pool.total

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `fits` with all of its max_tokens."""
        assert self.fits(sequence.prompt_tokens + sequence.max_tokens), "who adds has asked fits()"
        bisect.insort(self.waiting, sequence, key=lambda other: other.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its blocks; it has ended or was cancelled, and is in no step under way."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._guess += _GUESS_WEIGHT * (sequence.generated - self._guess)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def retract(self, sequence: Sequence) -> None:
        """What `sequence`, which runs, has computed is worthless: nobody finds its blocks any more."""
        if sequence.table is not None:
            sequence.table.retract()

    def expired(self, now: float) -> list[Sequence]:
        """Sequences that have not begun and whose deadline has passed."""
        return [sequence for sequence in self.waiting if sequence.deadline < now and not sequence.started]

    def schedule(self, ahead: int = 0) -> Step | None:
        """The next step, None where nothing can run. Its end is told by `advance` before the next is asked for.

        `ahead` steps may follow it at once, where all in it ran before and generate, none has a draft and there are blocks enough.
        """
        copies: list[tuple[int, int]] = []
        work = list(self._decodes(copies))
        generating = len(work)
        budget = self._limits.step_tokens
        if work:
            budget = min(budget - sum(one.rows for one in work), self._limits.mixed_tokens)
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed > 1 and budget > 0:
                work.append(self._chunk(sequence, budget))
                budget -= work[-1].count
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) == self._limits.sequences:
                break
            twin = self._twin(sequence)
            if twin is not None and not _prompt_is_read(twin):
                continue  # what it needs is being computed: it follows in a step or two, without doing so again
            if not self._admit(sequence, twin, copies):
                break
            work.append(self._chunk(sequence, budget))
            budget -= work[-1].count
        if ahead and len(work) == generating and not any(one.draft for one in work):
            work = self._go_on(work, ahead, copies)
        return Step(tuple(work), tuple(copies)) if work else None

    def _go_on(self, work: list[Work], ahead: int, copies: list[tuple[int, int]]) -> list[Work]:
        """`work` with room for `ahead` more tokens of each; as it is where that takes too many blocks: nobody gives way for it."""
        tables = [(one.sequence.table, one.end) for one in work]
        if sum(table.needed(end, end + ahead) for table, end in tables if table is not None) > self._pool.free:
            return work
        for table, end in tables:
            copies += [] if table is None else table.reserve(end, end + ahead)
        return [replace(one, ahead=ahead) for one in work]

    def advance(self, work: Work) -> None:
        """The keys and values of `work` are computed."""
        sequence = work.sequence
        assert sequence.table is not None, "what is in a step runs"
        sequence.computed = work.end
        if sequence.scored is not None:
            sequence.scored = max(sequence.scored, min(work.end, sequence.prompt_tokens - 1))
        sequence.table.publish(sequence.tokens, work.end)

    def confirm(self, work: Work, right: int) -> None:
        """`right` tokens behind `work`, of its draft or of the steps ahead, are tokens of the sequence now: their keys and values count."""
        sequence = work.sequence
        assert sequence.table is not None and right <= max(len(work.draft), work.ahead), "what is in a step runs"
        sequence.computed = work.end + right
        sequence.table.publish(sequence.tokens, sequence.computed)

    def _decodes(self, copies: list[tuple[int, int]]) -> Iterator[Work]:
        """One token of every sequence that has a single one left to compute; the last in order give way where blocks run out.

        Nobody gives way for a draft: it is dropped where it finds no room in blocks or in the step.
        """
        room = self._limits.step_tokens - self._limits.sequences
        for sequence in list(self.running):
            if sequence.table is None or len(sequence.tokens) - sequence.computed != 1:
                continue
            end = sequence.computed + 1
            draft = tuple(sequence.draft) if len(sequence.draft) <= room else ()
            if draft and sequence.table.needed(sequence.computed, end + len(draft)) > self._pool.free:
                draft = ()
            while sequence.table is not None:
                try:
                    copies += sequence.table.reserve(sequence.computed, end + len(draft))
                except OutOfBlocks:
                    self._preempt(self.running[-1])
                else:
                    room -= len(draft)
                    yield replace(self._chunk(sequence, 1), draft=draft)
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda other: other.order)

    def _release(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.table.release()
        sequence.table, sequence.computed = None, 0

    def _chunk(self, sequence: Sequence, budget: int) -> Work:
        start, scores = sequence.computed, sequence.scores
        count = min(budget, len(sequence.tokens) - start, self._limits.scored_tokens if scores else budget)
        end = start + count
        logits_from = end - 1 if end == len(sequence.tokens) else end
        if scores:
            assert sequence.scored is not None
            logits_from = min(logits_from, max(start, sequence.scored))
        return Work(sequence, start, count, logits_from)

    def _twin(self, sequence: Sequence) -> Sequence | None:
        """One that runs on the very same prompt and is before `sequence` in order, as the choices of one request are."""
        if sequence.scores or sequence.generated:
            return None
        for other in self.running:
            same = other.prompt_tokens == sequence.prompt_tokens and other.salt == sequence.salt and other.order < sequence.order
            if same and other.begins_with(sequence.tokens):
                return other
        return None

    def _admit(self, sequence: Sequence, twin: Sequence | None, copies: list[tuple[int, int]]) -> bool:
        """Let `sequence` run, with blocks for all that is known of it, where those that run are expected to leave enough.

        Blocks of its beginning are those of `twin`, to be copied when written, or what is found in the cache.
        """
        table = BlockTable(self._pool, self._size, sequence.salt)
        limit = len(sequence.tokens) - 1  # the last is computed in any case: its logits are wanted
        if sequence.scores:
            limit = min(limit, sequence.scored or 0)
        if twin is not None and twin.table is not None:
            table.fork(twin.table, limit)
            held = limit
        else:
            held = table.match(sequence.tokens, limit)
        length = len(sequence.tokens)
        need = table.needed(held, length) + (self._growth(sequence) + sum(map(self._growth, self.running)) if self.running else 0)
        if need > self._pool.free:
            table.release()
            return False
        copies += table.reserve(held, length)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=lambda other: other.order)
        if not sequence.started:
            sequence.cached = held
        sequence.table, sequence.computed, sequence.started = table, held, True
        return True

    def _growth(self, sequence: Sequence) -> int:
        """Blocks that a sequence is expected to ask for from now on."""
        expected = max(1.0, self._guess - sequence.generated)
        length = len(sequence.tokens)
        held = self._blocks(length) if sequence.table is None else len(sequence.table.blocks)
        return max(0, self._blocks(length + math.ceil(min(expected, sequence.max_tokens - sequence.generated))) - held)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._size)
