"""Drafts of the next tokens, which one step then verifies together: prompt lookup, and how much of it pays by measured steps.

Verification is exact. The sampler chooses each token from the model's own logits with that token's own random number, as it would
have done without a draft; a draft is right where it is the token that was chosen. So the text is the same, greedy or sampled, and all
that a wrong draft costs is time. For drafts that are single tokens this accepts as often as speculative sampling can (Leviathan et al.
2023, section 2.3: with probability p(draft)).
"""

import bisect
from collections.abc import Sequence

MOST_DRAFTED = 8  # tokens a step; beyond, each is right too seldom even in text that repeats itself
_LOOKUP = (4, 3, 2)  # tokens that must have stood in the text before; longer ones predict better
_REMEMBERED = 1 << 14  # tokens of a text that are searched
_PRIOR = 0.3  # share of right drafts before any was compared
_MEMORY = 0.15  # weight of the newest comparison
_MARGIN = 1.05  # drafts must promise this many times the tokens a second that come without
_ROWS_SHARE = 0.25  # of a step that grows with its rows, as long as larger ones were not measured
_NEWEST = 0.2  # weight of the newest measurement
_FORGOTTEN = 1024  # steps after which the time of a size that was not run any more counts no longer: it may have been an accident


class PromptLookup:
    """Continues a text as it went on the last time its newest tokens stood in it (prompt lookup decoding; Saxena 2023)."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it, the newest
        self._known = 0  # leading tokens whose n-grams are noted

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, a text that only ever grows between calls."""
        self._note(tokens)
        for size in _LOOKUP:
            place = self._places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if place is not None:
                found = list(tokens[place : place + most])
                return [found[index % len(found)] for index in range(most)]  # what repeats itself now goes on doing so
        return []

    def _note(self, tokens: Sequence[int]) -> None:
        """Note the n-grams that have something behind them."""
        for end in range(max(self._known, len(tokens) - _REMEMBERED), len(tokens)):
            for size in _LOOKUP:
                if end >= size:
                    self._places[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)


class StepCost:
    """Seconds of a step by its tokens: a running mean for every size, straight lines between sizes that were measured.

    No line through all of them: one token more than a single one costs most of a step where products for one token have kernels of their
    own, and the sixteenth next to nothing.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []  # sorted
        self._seconds: dict[int, float] = {}
        self._newest: dict[int, int] = {}  # size -> when it was measured last, in steps
        self._steps = 0

    def measured(self, rows: int, seconds: float) -> None:
        """A step of `rows` tokens took so long."""
        self._steps += 1
        if rows in self._seconds:
            self._seconds[rows] += _NEWEST * (seconds - self._seconds[rows])
        else:
            bisect.insort(self._sizes, rows)
            self._seconds[rows] = seconds
        self._newest[rows] = self._steps
        if self._steps % _FORGOTTEN == 0:
            self._forget()

    def seconds(self, rows: int) -> float | None:
        """Of a step of `rows` tokens; None before any was measured."""
        if not self._sizes or rows in self._seconds:
            return self._seconds.get(rows)
        at = bisect.bisect(self._sizes, rows)
        if at == 0:
            return self._seconds[self._sizes[0]]
        below = self._sizes[at - 1]
        if at == len(self._sizes):
            return self._seconds[below] * (1 + _ROWS_SHARE * (rows - below) / below)
        above = self._sizes[at]
        share = (rows - below) / (above - below)
        return (1 - share) * self._seconds[below] + share * self._seconds[above]

    def _forget(self) -> None:
        for rows in [rows for rows, step in self._newest.items() if step <= self._steps - _FORGOTTEN]:
            self._sizes.remove(rows)
            del self._seconds[rows], self._newest[rows]


def worthwhile(right: float, most: int, sequences: int, cost: StepCost, drafting: float = 0.0) -> int:
    """How many tokens ahead to draft, at most `most`, where each is right with the probability `right` if all before it were.

    Those with which most tokens come out in a second, `sequences` sequences drafting alike; none where it is not clear that it pays.
    `cost` is that of the steps that verify; each token ahead takes `drafting` seconds to draft.
    """
    plain = cost.seconds(sequences)
    if plain is None:
        return 0
    best, best_gain = 0, _MARGIN
    tokens, probability = 1.0, 1.0
    for length in range(1, most + 1):
        probability *= right
        tokens += probability
        verifying = cost.seconds(sequences * (1 + length))
        assert verifying is not None, "one size was measured"
        seconds = verifying + length * drafting
        gain = tokens * plain / seconds if seconds > 0 else 0.0
        if gain > best_gain:
            best, best_gain = length, gain
    return best


class Drafting:
    """How far ahead one sequence is drafted, from how often what lookup says came true.

    That is known without a single draft, because the text goes on anyway: what lookup said is compared with what came. So a text that
    does not repeat itself pays nothing for speculation.
    """

    def __init__(self) -> None:
        self._lookup = PromptLookup()
        self._right = _PRIOR
        self._said: list[int] = []  # to follow the first `_known` tokens
        self._known = 0

    def draft(self, tokens: Sequence[int], most: int, sequences: int, cost: StepCost) -> list[int]:
        """Tokens to try, at most `most`. `tokens` is the text so far; `cost` that of steps of the model, in which `sequences` run now."""
        for said, came in zip(self._said, tokens[self._known :], strict=False):
            self._right += _MEMORY * ((1.0 if said == came else 0.0) - self._right)
            if said != came:
                break
        self._said, self._known = self._lookup.propose(tokens, MOST_DRAFTED), len(tokens)
        if not self._said:
            return []
        return self._said[: worthwhile(self._right, min(most, MOST_DRAFTED), sequences, cost)]
