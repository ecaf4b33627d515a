"""From a planned step to the next token of each sequence: one forward pass, one batched choice, failures kept to their rows."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantizers.errors import OutOfMemory, PrecisError
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.generation import Generation
from server.engine.sampler import NonFiniteLogits, Sampled, sample
from server.engine.scheduler import Step, Work

logger = logging.getLogger(__name__)

Outcome = Sampled | PrecisError | None  # the next token, what went wrong, or None where no token follows yet or none is wanted


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
    outcomes: list[Outcome] = []
    for work, rows in zip(step.work, logits, strict=True):
        outcomes.append(rows if isinstance(rows, PrecisError) else _score(generations[work.sequence.call], work, rows))
    sampled = [
        index
        for index, work in enumerate(step.work)
        if work.samples and outcomes[index] is None and work.sequence.max_tokens > work.sequence.generated
    ]
    if sampled:
        last = torch.stack([rows[-1] for index in sampled if isinstance(rows := logits[index], Tensor)])
        samplers = [generations[step.work[index].sequence.call].sampler for index in sampled]
        for index, outcome in zip(sampled, sample(last, samplers), strict=True):
            outcomes[index] = outcome
    return outcomes


def _score(generation: Generation, work: Work, rows: Tensor) -> NonFiniteLogits | None:
    try:
        generation.score(work, rows)
    except NonFiniteLogits as error:
        return error
    return None


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
    return list(torch.split(logits, [one.end - one.logits_from for one in work]))


def _chunk(work: Work) -> Chunk:
    sequence = work.sequence
    assert sequence.table is not None, "what is in a step runs"
    return Chunk(sequence.tokens[work.start : work.end], work.start, sequence.table.blocks, work.logits_from - work.start)


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
