"""What requests are told, in the order in which it happened. Plain tokens go out together: those of a step, and of quick steps those of
several, because each message costs the server and the client about as much as a token of a small model.
"""

import time
from collections.abc import Callable

from server.engine.interface import Event, Started, Token
from server.engine.messages import Report, RequestEvent, StepTokens

Emit = Callable[[Report], None]

GATHER_SECONDS = 0.005  # that a token may wait for others; a screen shows a new picture every 16 ms


class Outbox:
    """Used under the loop's lock. What was told is only sure to have gone out after `flush`."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._tokens: list[tuple[int, int]] = []
        self._due = 0.0  # when the oldest of them is to be out
        self._silent: set[int] = set()  # calls that have no token yet

    def tell(self, call: int, event: Event) -> None:
        """One event of the request `call`."""
        if isinstance(event, Token) and event.logprob is None:
            if not self._tokens:
                self._due = time.monotonic() + GATHER_SECONDS
            if call in self._silent:  # the first is waited for
                self._silent.discard(call)
                self._due = 0.0
            self._tokens.append((call, event.token_id))
            return
        self.flush()
        if isinstance(event, Started):
            self._silent.add(call)
        else:
            self._silent.discard(call)
        self._emit(RequestEvent(call=call, event=event))

    def before(self, seconds: float | None) -> None:
        """The next step is expected to take so long, if that is known: send what would wait too long for its tokens."""
        if seconds is None or time.monotonic() + seconds > self._due:
            self.flush()

    def flush(self) -> None:
        """Send the tokens that wait for more."""
        if self._tokens:
            self._emit(StepTokens(tokens=tuple(self._tokens)))
            self._tokens.clear()
