"""From a planned step to the next token of each sequence: one forward pass, one batched choice, failures kept to their rows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantizers.errors import OutOfMemory, PrecisError
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.generation import Generation
from server.engine.sampler import NonFiniteLogits, Sampled, is_finite, sample
from server.engine.scheduler import Step, Work

logger = logging.getLogger(__name__)

# The next tokens, those of a draft that were right and one more; none where none follows yet or is wanted; or what went wrong.
Outcome = tuple[Sampled, ...] | PrecisError


def compute(executor: Executor, step: Step, generations: Mapping[int, Generation]) -> list[Outcome]:
    """Run `step` and choose tokens; one outcome for each of its works, in order. `generations` are by call.

    Raises torch.AcceleratorError where the device itself is lost; everything else that goes wrong is an outcome.
    """
    for src, dst in step.copies:
        executor.copy_block(src, dst)
    for work in step.work:
        if work.samples:
            generations[work.sequence.call].sampler.prepare()
    logits = _forward(executor, step.work, generations)
    for index, work in enumerate(step.work):
        if work.draft and not _is_sound(logits[index], work):
            logits[index] = _without_draft(executor, work, generations)
    outcomes: list[Outcome] = []
    for work, rows in zip(step.work, logits, strict=True):
        outcomes.append(rows if isinstance(rows, PrecisError) else _score(generations[work.sequence.call], work, rows))
    active = [
        index
        for index, work in enumerate(step.work)
        if work.samples and outcomes[index] == () and work.sequence.max_tokens > work.sequence.generated
    ]
    drafted = 0  # of the draft, that were right in all of `active`
    while active:
        next_rows = [_next_row(logits[index], step.work[index], drafted) for index in active]
        sampled = sample(next_rows, [generations[step.work[index].sequence.call].sampler for index in active])
        for index, found in zip(active, sampled, strict=True):
            before = outcomes[index]
            assert not isinstance(before, PrecisError), "who failed is not active"
            if not isinstance(found, PrecisError):
                outcomes[index] = (*before, found)
            elif not before:
                outcomes[index] = found  # else the next step comes to the same failure, with what was right told before
        active = [index for index in active if _goes_on(step.work[index], outcomes[index], logits[index], generations)]
        drafted += 1
    return outcomes


def _next_row(logits: Tensor | PrecisError, work: Work, drafted: int) -> Tensor:
    """Logits [vocab] behind everything known of a sequence and `drafted` tokens of its draft."""
    assert isinstance(logits, Tensor), "who failed is not active"
    return logits[work.end - work.logits_from - 1 + drafted]


def _goes_on(work: Work, outcome: Outcome, logits: Tensor | PrecisError, generations: Mapping[int, Generation]) -> bool:
    """Whether the newest token is the draft's, so that the logits behind it hold; there are none where the draft was dropped."""
    assert isinstance(logits, Tensor), "who failed is not active"
    if isinstance(outcome, PrecisError) or not 0 < len(outcome) <= len(logits) - (work.end - work.logits_from):
        return False
    token, _ = outcome[-1]
    return token == work.draft[len(outcome) - 1] and not generations[work.sequence.call].ends_with(token)


def _is_sound(logits: Tensor | PrecisError, work: Work) -> bool:
    """Whether what is known of a sequence was computed well beside its draft."""
    return isinstance(logits, Tensor) and is_finite(logits[: work.end - work.logits_from])


def _without_draft(executor: Executor, work: Work, generations: Mapping[int, Generation]) -> Tensor | PrecisError:
    """Logits of `work` again: nobody fails for a token that was only guessed. The newest token stands in the draft's place, so that
    nothing of it stays in the cache, where a NaN would spoil products that leave it out."""
    stand_in = (work.sequence.tokens[work.end - 1],) * len(work.draft)
    (logits,) = _forward(executor, [replace(work, draft=stand_in)], generations)
    return logits if isinstance(logits, PrecisError) else logits[: work.end - work.logits_from]


def _score(generation: Generation, work: Work, rows: Tensor) -> Outcome:
    try:
        generation.score(work, rows)
    except NonFiniteLogits as error:
        return error
    return ()


def _forward(executor: Executor, work: Sequence[Work], generations: Mapping[int, Generation]) -> list[Tensor | PrecisError]:
    """Logits [wanted positions, vocab] of each work. Where the batch as a whole fails, each is tried alone: only the guilty fail."""
    try:
        logits = executor.forward(ragged_batch([_chunk(one) for one in work]))
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever the model's code raises; translate() logs what is unknown)
        if len(work) > 1:
            return [result for one in work for result in _forward(executor, [one], generations)]
        return [translate(error, f"request {generations[work[0].sequence.call].id}")]
    return list(torch.split(logits, [one.end - one.logits_from + len(one.draft) for one in work]))


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
