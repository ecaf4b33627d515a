"""Which variant drafts for which: that of the twin's precision for any other of the same checkpoint, while it has no requests itself.

A twin that drafts is pinned, and it holds blocks of its cache. Both are given back as soon as its own variant has requests, those that
it drafts for have ended, or a load waits for memory. Everything here happens under the loop's lock.
"""

from collections.abc import Mapping, Sized

from quantizers.errors import OutOfMemory
from server.engine.interface import VariantKey
from server.engine.residents import Residents
from server.engine.twin import Twin

_CACHE_TOKENS = 4096  # that a twin's cache is opened for, at the least; where there is room it is as large as any


class Twins:
    """The twins at work."""

    def __init__(self, residents: Residents, precision: str | None) -> None:
        self._residents, self._precision = residents, precision
        self._wanted: set[VariantKey] = set()  # variants whose own requests wait for their twin to end its work
        self._working: dict[VariantKey, tuple[VariantKey, Twin]] = {}  # whom it drafts for -> the twin's variant, and the twin

    def of(self, key: VariantKey, jobs: Mapping[VariantKey, Mapping[int, object]]) -> Twin | None:
        """The twin that may draft for `key` in this step; None where there is none. `jobs` are those of each variant, by call.

        In the thread that computes.
        """
        if self._precision is None or key.precision == self._precision:
            return None
        if key not in self._working:
            twin_key = VariantKey(model=key.model, precision=self._precision)
            free = twin_key not in jobs and all(taken != twin_key for taken, _ in self._working.values())
            runner = self._residents.runner_of(twin_key) if free and not self._residents.blocked else None
            if runner is None:
                return None
            self._residents.pin(twin_key)
            if runner.scheduler is None:
                try:
                    self._residents.open_cache(twin_key, min(_CACHE_TOKENS, runner.max_model_len))
                except OutOfMemory:  # it only makes things faster: no room is no error
                    self._residents.unpin(twin_key)
                    return None
            assert runner.scheduler is not None, "an open cache has a scheduler"
            self._working[key] = twin_key, Twin(runner.executor, runner.scheduler.pool)
        twin = self._working[key][1]
        twin.keep(list(jobs[key]))
        return twin

    def claim(self, key: VariantKey) -> bool:
        """Whether requests of `key` may run; else its work as a twin ends before the next step, and they may then."""
        if any(taken == key for taken, _ in self._working.values()):
            self._wanted.add(key)
            return False
        return True

    def settle(self, jobs: Mapping[VariantKey, Sized]) -> None:
        """End the work of twins that are wanted for something else, or for nothing any more. In the thread that computes."""
        for key, (twin_key, twin) in list(self._working.items()):
            if key not in jobs or twin_key in self._wanted or self._residents.blocked:
                twin.release()
                self._residents.unpin(twin_key)
                del self._working[key]
        self._wanted.clear()
