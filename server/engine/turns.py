"""Which variant has the device next: deficit round robin, with seconds of the device as the cost.

Every variant that has work is credited the same time in each round and keeps the device while it has credit left, so that a variant
with long steps or many sequences takes no more of the device than the others, and changes between variants stay rare.
"""

from collections.abc import Collection
from typing import Generic, TypeVar

K = TypeVar("K")

QUANTUM_SECONDS = 0.05  # of one round: a stream of another variant waits about this long between two of its tokens


class Turns(Generic[K]):
    """Credits of the variants that have work."""

    def __init__(self, quantum: float = QUANTUM_SECONDS) -> None:
        self._quantum = quantum
        self._credit: dict[K, float] = {}  # in the order of the round; the first is the one whose turn it is

    def next(self, active: Collection[K]) -> K:
        """Whose step is next, of `active`, which is not empty. Who has no work any more loses its credit, and its debt."""
        self._credit = {key: credit for key, credit in self._credit.items() if key in active}
        for key in active:
            self._credit.setdefault(key, self._quantum)
        while True:
            key, credit = next(iter(self._credit.items()))
            if credit > 0:
                return key
            del self._credit[key]
            self._credit[key] = credit + self._quantum  # to the end of the round

    def charge(self, key: K, seconds: float) -> None:
        """`key` had the device for this long."""
        if key in self._credit:
            self._credit[key] -= seconds
