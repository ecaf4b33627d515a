"""Drafts of the next tokens, which one step then verifies together: prompt lookup, and how much of it pays.

Verification is exact. The sampler chooses each token from the model's own logits with that token's own random number, as it would
have done without a draft; a draft is right where it is the token that was chosen. So the text is the same, greedy or sampled, and all
that a wrong draft costs is time. For drafts that are single tokens this accepts as often as speculative sampling can (Leviathan et al.
2023, section 2.3: with probability p(draft)).
"""

import math
from collections.abc import Sequence

MOST_DRAFTED = 8  # tokens a step; beyond, each is right too seldom even in text that repeats itself
_LOOKUP = (4, 3, 2)  # tokens that must have stood in the text before; longer ones predict better
_REMEMBERED = 1 << 14  # tokens of a text that are searched
_PRIOR = 0.5  # share of right drafts before any was tried
_MEMORY = 0.1  # weight of the newest draft
_RETRY = 48  # tokens after which a sequence whose drafts do not pay tries one again
_ROWS_SHARE = 0.25  # of a step of one sequence that grows with its rows, before steps were measured
_DECAY = 0.98  # of a measured step's weight, with each that follows


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
    """Seconds of a step as a line over its tokens, fitted to the newest steps (weighted least squares)."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._product = 0.0

    def measured(self, rows: int, seconds: float) -> None:
        """A step of `rows` tokens took so long."""
        for name, value in (
            ("_weight", 1.0),
            ("_rows", rows),
            ("_seconds", seconds),
            ("_rows2", rows * rows),
            ("_product", rows * seconds),
        ):
            setattr(self, name, _DECAY * getattr(self, name) + value)

    def growing_share(self, sequences: int) -> float:
        """Share of a step of `sequences` tokens that grows with their number, from 0 to 1: what one more token costs, times all of them."""
        slope, base = self._line() or (_ROWS_SHARE, 1.0 - _ROWS_SHARE)
        growing = slope * sequences
        return 1.0 if growing + base <= 0 else min(max(growing / (growing + base), 0.0), 1.0)

    def seconds(self, rows: int) -> float | None:
        """Of a step of `rows` tokens; None where too little was measured to tell."""
        line = self._line()
        return None if line is None else max(0.0, line[0] * rows + line[1])

    def _line(self) -> tuple[float, float] | None:
        """Slope and base, None before steps of different sizes were measured."""
        variance = self._weight * self._rows2 - self._rows**2
        if self._weight < 4 or variance < 1e-3 * self._rows2 * self._weight:
            return None
        slope = (self._weight * self._product - self._rows * self._seconds) / variance
        return slope, (self._seconds - slope * self._rows) / self._weight


class Drafting:
    """How far ahead one sequence is drafted, from how often its drafts were right."""

    def __init__(self) -> None:
        self._lookup = PromptLookup()
        self._right = _PRIOR
        self._waited = 0

    def draft(self, tokens: Sequence[int], most: int, growing_share: float) -> list[int]:
        """Tokens to try. `growing_share` is StepCost's for what runs now.

        The j-th draft adds a token with the probability right^j and costs what a token's row costs. It pays while that probability is
        above the share of a step's time that goes to a row of its own, because otherwise the time makes more tokens without it.
        """
        length = MOST_DRAFTED if growing_share <= 0 else 0
        if 0 < growing_share < 1:
            length = min(MOST_DRAFTED, int(math.log(growing_share) / math.log(min(self._right, 0.99))))
        if length < 1:
            self._waited += 1
            if self._waited < _RETRY:
                return []
            self._waited, length = 0, 1
        return self._lookup.propose(tokens, min(length, most))

    def verified(self, drafted: int, right: int) -> None:
        """Of `drafted` tokens the first `right` were right."""
        for index in range(min(drafted, right + 1)):
            self._right += _MEMORY * ((1.0 if index < right else 0.0) - self._right)
