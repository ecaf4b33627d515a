"""How many requests may wait, and when one that is refused should come back. Plain numbers, no clock of its own."""

from collections import deque

from quantizers.errors import Overloaded

_REMEMBERED = 32  # ends of requests that the rate is taken from
_UNKNOWN_SECONDS = 2.0  # before any request has ended
_SHORTEST, _LONGEST = 1.0, 60.0  # of an estimate that is given away


class Arrivals:
    """A bound on the queue, and the rate at which requests end."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    def check(self, waiting: int) -> None:
        """Raises Overloaded, with an estimate of when to come back, where as many wait as may."""
        if waiting >= self._max_waiting:
            seconds = self.retry_after(waiting)
            raise Overloaded(
                f"{self._max_waiting} requests are waiting, which is all that may: try again in {seconds:.0f} s",
                code="queue_full",
                retry_after_seconds=seconds,
            )

    def ended(self, now: float) -> None:
        """A request ended, at `now` in seconds of any clock."""
        self._ends.append(now)

    def retry_after(self, waiting: int) -> float:
        """Seconds in which as many requests end as wait now, at the rate of the newest ends."""
        if len(self._ends) < 2 or self._ends[-1] == self._ends[0]:
            return _UNKNOWN_SECONDS
        seconds = waiting * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(max(seconds, _SHORTEST), _LONGEST)
