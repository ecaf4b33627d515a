"""From a planned step to the next tokens of each sequence: forward passes, batched choices, failures kept to their rows."""

import ctypes
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantizers.errors import OutOfMemory, PrecisError
from server.engine.executor import Chunk, Decoder, Executor, Int32, ragged_batch
from server.engine.generation import Generation
from server.engine.sampler import NonFiniteLogits, Sampled, Sampler, is_finite, sample
from server.engine.scheduler import Step, Work

logger = logging.getLogger(__name__)


class _Rows(NamedTuple):
    """Logits [positions, vocab] that one work wants, and of each row what the executor says of its largest."""

    logits: Tensor
    largest: Int32 | None

    def part(self, begin: int, end: int) -> "_Rows":
        return _Rows(self.logits[begin:end], None if self.largest is None else self.largest[begin:end])


# The next tokens, those of a draft that were right and one more; none where none follows yet or is wanted; or what went wrong.
Outcome = tuple[Sampled, ...] | PrecisError


def compute(executor: Executor, step: Step, generations: Mapping[int, Generation], interrupted: ctypes.c_int32) -> list[Outcome]:
    """Run `step` and choose tokens; one outcome for each of its works, in order. `generations` are by call.

    Steps ahead are run too, as long as `interrupted`, which another thread may set, is 0.
    Raises torch.AcceleratorError where the device itself is lost; everything else that goes wrong is an outcome.
    """
    for src, dst in step.copies:
        executor.copy_block(src, dst)
    if step.ahead and isinstance(executor, Decoder) and (gone := _go_on(executor, step, generations, interrupted)) is not None:
        return gone
    for work in step.work:
        if work.samples:
            generations[work.sequence.call].sampler.prepare()
    found = _forward(executor, step.work, generations)
    for index, work in enumerate(step.work):
        if work.draft and not _is_sound(found[index], work):
            found[index] = _without_draft(executor, work, generations)
    outcomes: list[Outcome] = []
    for work, rows in zip(step.work, found, strict=True):
        outcomes.append(rows if isinstance(rows, PrecisError) else _score(generations[work.sequence.call], work, rows))
    active = [
        index
        for index, work in enumerate(step.work)
        if work.samples and outcomes[index] == () and work.sequence.max_tokens > work.sequence.generated
    ]
    drafted = 0  # of the draft, that were right in all of `active`
    while active:
        places = [_place(found[index], step.work[index], drafted) for index in active]
        sampled = _choose(places, [generations[step.work[index].sequence.call].sampler for index in active])
        for index, token in zip(active, sampled, strict=True):
            before = outcomes[index]
            assert not isinstance(before, PrecisError), "who failed is not active"
            if not isinstance(token, PrecisError):
                outcomes[index] = (*before, token)
            elif not before:
                outcomes[index] = token  # else the next step comes to the same failure, with what was right told before
        active = [index for index in active if _goes_on(step.work[index], outcomes[index], found[index], generations)]
        drafted += 1
    return outcomes


def _go_on(executor: Decoder, step: Step, generations: Mapping[int, Generation], interrupted: ctypes.c_int32) -> list[Outcome] | None:
    """The tokens of `step` and of the steps ahead. None where nothing came of it: the step as such will say for whom, and why."""
    going, rounds = [generations[work.sequence.call] for work in step.work], 1 + step.ahead
    try:
        batch = ragged_batch([_chunk(work) for work in step.work])
        tokens = executor.decode(batch, [generation.choice(rounds) for generation in going], rounds, interrupted)
    except Exception as error:  # noqa: BLE001 (whatever it is, the step alone comes to it again)
        logger.debug("several steps at once failed: %s", error)
        return None
    if (tokens[0] < 0).any():
        return None
    outcomes: list[Outcome] = []
    for generation, column in zip(going, tokens.T.tolist(), strict=True):
        chosen = list(itertools.takewhile(lambda token: token >= 0, column))
        for token in chosen:
            generation.sampler.accept(token)
        outcomes.append(tuple((token, None) for token in chosen))
    return outcomes


def _place(rows: _Rows | PrecisError, work: Work, drafted: int) -> tuple[_Rows, int]:
    """The row of logits behind everything known of a sequence and `drafted` tokens of its draft."""
    assert isinstance(rows, _Rows), "who failed is not active"
    return rows, work.end - work.logits_from - 1 + drafted


def _choose(places: Sequence[tuple[_Rows, int]], samplers: Sequence[Sampler]) -> list[Sampled | PrecisError]:
    """As `sample`, with what the executor has found already."""
    largest = [None if rows.largest is None else int(rows.largest[row]) for rows, row in places]
    return sample([rows.logits[row] for rows, row in places], samplers, largest)


def _goes_on(work: Work, outcome: Outcome, rows: _Rows | PrecisError, generations: Mapping[int, Generation]) -> bool:
    """Whether the newest token is the draft's, so that the logits behind it hold; there are none where the draft was dropped."""
    assert isinstance(rows, _Rows), "who failed is not active"
    if isinstance(outcome, PrecisError) or not 0 < len(outcome) <= len(rows.logits) - (work.end - work.logits_from):
        return False
    token, _ = outcome[-1]
    return token == work.draft[len(outcome) - 1] and not generations[work.sequence.call].ends_with(token)


def _is_sound(rows: _Rows | PrecisError, work: Work) -> bool:
    """Whether what is known of a sequence was computed well beside its draft."""
    return isinstance(rows, _Rows) and is_finite(rows.logits[: work.end - work.logits_from])


def _without_draft(executor: Executor, work: Work, generations: Mapping[int, Generation]) -> _Rows | PrecisError:
    """Logits of `work` again: nobody fails for a token that was only guessed. The newest token stands in the draft's place, so that
    nothing of it stays in the cache, where a NaN would spoil products that leave it out."""
    stand_in = (work.sequence.tokens[work.end - 1],) * len(work.draft)
    (rows,) = _forward(executor, [replace(work, draft=stand_in)], generations)
    return rows if isinstance(rows, PrecisError) else rows.part(0, work.end - work.logits_from)


def _score(generation: Generation, work: Work, rows: _Rows) -> Outcome:
    if not generation.scored:
        return ()
    try:
        generation.score(work, rows.logits, finite=rows.largest is not None and bool((rows.largest >= 0).all()))
    except NonFiniteLogits as error:
        return error
    return ()


def _forward(executor: Executor, work: Sequence[Work], generations: Mapping[int, Generation]) -> list[_Rows | PrecisError]:
    """Rows that each work wants. Where the batch as a whole fails, each is tried alone: only the guilty fail."""
    try:
        rows = _Rows(executor.forward(ragged_batch([_chunk(one) for one in work])), executor.largest)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever the model's code raises; translate() logs what is unknown)
        if len(work) > 1:
            return [result for one in work for result in _forward(executor, [one], generations)]
        return [translate(error, f"request {generations[work[0].sequence.call].id}")]
    if len(work) == 1:
        return [rows]
    starts = itertools.accumulate((one.end - one.logits_from + len(one.draft) for one in work), initial=0)
    return [rows.part(begin, end) for begin, end in itertools.pairwise(starts)]


def _chunk(work: Work) -> Chunk:
    sequence = work.sequence
    assert sequence.table is not None, "what is in a step runs"
    tokens = [*sequence.tokens[work.start : work.end], *work.draft]
    return Chunk(tokens, work.start, sequence.table.blocks, work.logits_from - work.start)


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
