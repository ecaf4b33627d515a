"""Twin speculation: a variant of the same checkpoint in fewer bits drafts tokens, which the served precision verifies in one step.

The twin has the same tokenizer and nearly the same opinions, and a step of it reads fewer bytes. It draws each draft with the random
number that the sampler will draw the token with, so that sampled texts agree about as often as the two distributions do. What is
verified how is `speculation`'s matter: the text never depends on the twin.

The twin's cache is that of its own variant, of which this takes blocks only while that variant has no requests.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.blocks import BlockPool, BlockTable, OutOfBlocks
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.generation import Generation
from server.engine.sampler import guess
from server.engine.speculation import StepCost, worthwhile

MOST_DRAFTED = 5  # tokens a step; the twin computes each with a step of its own
_READ_TOKENS = 256  # of texts that the twin has not seen yet, a step: as much as is read beside running streams, about
_PRIOR = 0.7  # share of right drafts before any was verified
_MEMORY = 0.02  # weight of the newest draft of any sequence
_FIRST_RETRY, _LAST_RETRY = 64, 1024  # steps after which drafting is tried again where it did not pay, twice as many each time
_TWIN_STEP = 0.5  # of a step, that one of the twin takes, before either was measured


@dataclass
class _State:
    """What the twin has computed of one sequence."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)


class Twin:
    """Drafts for the sequences of one variant. Used by the thread that computes."""

    def __init__(self, executor: Executor, pool: BlockPool) -> None:
        """`pool` is of the cache that `executor` has now."""
        self._executor, self._pool = executor, pool
        self._states: dict[int, _State] = {}  # by call
        self._cost = StepCost()
        self._right = _PRIOR
        self._waited, self._patience = 0, _FIRST_RETRY

    def release(self) -> None:
        """Give all blocks back."""
        for state in self._states.values():
            state.table.release()
        self._states.clear()

    def keep(self, calls: Sequence[int]) -> None:
        """Give back what belongs to other sequences than these."""
        for call in self._states.keys() - set(calls):
            self._states.pop(call).table.release()

    def verified(self, drafted: int, right: int) -> None:
        """Of `drafted` tokens the first `right` were right."""
        for index in range(min(drafted, right + 1)):
            self._right += _MEMORY * ((1.0 if index < right else 0.0) - self._right)

    def length(self, sequences: int, cost: StepCost) -> int:
        """How many tokens ahead to draft for `sequences` sequences: those with which most tokens come out in a second.

        `cost` is that of the steps that verify.
        """
        plain = cost.seconds(sequences)
        if plain is None:
            return 0
        drafting = self._cost.seconds(sequences)
        best = worthwhile(self._right, MOST_DRAFTED, sequences, cost, _TWIN_STEP * plain if drafting is None else drafting)
        if best:
            self._waited, self._patience = 0, _FIRST_RETRY
            return best
        self._waited += 1
        if self._waited < self._patience:
            return 0
        self._waited, self._patience = 0, min(2 * self._patience, _LAST_RETRY)
        return 1

    def draft(self, generations: Sequence[Generation], length: int) -> dict[int, list[int]]:
        """At most `length` tokens for each, by call. One whose text the twin has yet to read gets none for now."""
        ready = [generation for generation in generations if self._read(generation)]
        drafts: dict[int, list[int]] = {generation.sequence.call: [] for generation in ready}
        for ahead in range(length):
            chunks, rows = [], []
            for generation in ready:
                call, state = generation.sequence.call, self._states[generation.sequence.call]
                text = [*generation.sequence.tokens, *drafts[call]]
                if ahead >= generation.room or not self._reserve(state, len(text)):
                    continue
                chunks.append(Chunk(text[len(state.tokens) :], len(state.tokens), state.table.blocks, len(text) - len(state.tokens) - 1))
                state.tokens = text
                rows.append(generation)
            if not chunks:
                break
            began = time.perf_counter()
            logits = self._executor.forward(ragged_batch(chunks))
            self._cost.measured(sum(len(chunk.token_ids) for chunk in chunks), time.perf_counter() - began)
            guessed = guess(logits, [generation.sampler for generation in rows], ahead)
            for generation, token in zip(rows, guessed, strict=True):
                drafts[generation.sequence.call].append(token)
        return drafts

    def _read(self, generation: Generation) -> bool:
        """Bring the twin up to the text's last token but one, a piece a step; returns whether it is there."""
        sequence = generation.sequence
        state = self._states.get(sequence.call)
        if state is None:
            state = self._states[sequence.call] = _State(BlockTable(self._pool, self._executor.block_size, sequence.salt))
        known = _common(state.tokens, sequence.tokens)
        state.tokens = sequence.tokens[: min(known, len(sequence.tokens) - 1)]
        missing = len(sequence.tokens) - 1 - len(state.tokens)
        if missing <= MOST_DRAFTED:
            return True
        end = len(state.tokens) + min(missing, _READ_TOKENS)
        if self._reserve(state, end):
            piece = sequence.tokens[len(state.tokens) : end]
            self._executor.forward(ragged_batch([Chunk(piece, len(state.tokens), state.table.blocks, len(piece) - 1)]))
            state.tokens = sequence.tokens[:end]
        return False

    def _reserve(self, state: _State, end: int) -> bool:
        try:
            copies = state.table.reserve(len(state.tokens), end)
        except OutOfBlocks:
            return False
        assert not copies, "the twin shares no blocks"
        return True


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    if list(other[: len(one)]) == list(one):
        return len(one)
    return next(index for index, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
