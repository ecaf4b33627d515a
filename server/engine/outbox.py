"""What requests are told, in the order in which it happened: the plain tokens of a step go out as one report."""

from collections.abc import Callable

from server.engine.interface import Event, Token
from server.engine.messages import Report, RequestEvent, StepTokens

Emit = Callable[[Report], None]


class Outbox:
    """Used under the loop's lock. What was told is only sure to have gone out after `flush`."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._tokens: list[tuple[int, int]] = []

    def tell(self, call: int, event: Event) -> None:
        """One event of the request `call`."""
        if isinstance(event, Token) and event.logprob is None:
            self._tokens.append((call, event.token_id))
            return
        self.flush()
        self._emit(RequestEvent(call=call, event=event))

    def flush(self) -> None:
        """Send the tokens that wait for more of their step."""
        if self._tokens:
            self._emit(StepTokens(tokens=tuple(self._tokens)))
            self._tokens.clear()
