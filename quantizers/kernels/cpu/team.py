"""How many threads a step gets: all of them on a machine of our own, fewer while others use the cores.

Every phase of a step ends when its slowest thread has done its part. Where another program takes turns on the cores, some thread is
nearly always put off, and a team is slower than one thread alone, which waits for nobody. A step's result does not depend on the size.
"""

import time
from collections.abc import Callable

_BAD_STEPS = 2  # in a row: one alone is an accident
_FIRST_RETRY, _LAST_RETRY = 0.25, 2.0  # seconds until the larger team is tried again, doubled each time that it was bad


class TeamSize:
    """The choice for the next step, from what the steps before waited. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._halvings = 0
        self._bad_steps = 0
        self._retry_after = _FIRST_RETRY
        self._retry_at = 0.0
        self._is_trial = False

    def choose(self, most: int) -> int:
        """1 to `most`: the number of threads for the next step."""
        while self._halvings and most >> (self._halvings - 1) <= 1:
            self._halvings -= 1  # `most` became smaller
        self._is_trial = self._halvings > 0 and self._clock() >= self._retry_at
        return max(1, most >> (self._halvings - self._is_trial))

    def learn(self, threads: int, seconds: float, waited: float) -> None:
        """A step on `threads` threads took `seconds`, of which its calling thread waited `waited` for the others.

        Half of the team does the same in 2 * (seconds - waited) where it waits for nobody: sooner, if more than half was waiting.
        """
        bad = threads > 1 and waited > seconds / 2
        if self._is_trial:
            if bad:
                self._retry_after = min(2 * self._retry_after, _LAST_RETRY)
                self._retry_at = self._clock() + self._retry_after
            else:
                self._halvings -= 1
                self._retry_after = _FIRST_RETRY
                self._retry_at = self._clock() + self._retry_after
            self._is_trial = False
            return
        self._bad_steps = self._bad_steps + 1 if bad else 0
        if self._bad_steps == _BAD_STEPS:
            self._bad_steps = 0
            self._halvings += 1
            self._retry_at = self._clock() + self._retry_after
