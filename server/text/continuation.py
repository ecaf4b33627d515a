"""The text that generated tokens make, as it may be shown: whole characters, cut at a stop string, and the tokens that it is of."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.interface import Token
from server.text.detokenizer import Detokenizer
from server.text.stop import StopStrings


@dataclass(frozen=True)
class PlacedToken:
    """A token and the characters of the continuation's text that it completed: `[start, end)`, empty for a part of a character."""

    token: Token
    start: int
    end: int


@dataclass(frozen=True)
class Shown:
    """Text that may go out, and the tokens whose text is out with it."""

    text: str
    tokens: tuple[PlacedToken, ...]


class Continuation:
    """Fed with tokens. Stop strings count only in what follows the first `min_tokens` tokens.

    A token is shown with the last of its text; one whose text begins at or after a stop string is not shown.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._pending: list[PlacedToken] = []
        self._decoded = 0  # characters
        self._shown = 0  # characters
        self.token_count = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found: the text is at its end."""
        return self._stops.matched

    def add(self, token: Token) -> Shown:
        text = self._detokenizer.add(token.token_id)
        self._pending.append(PlacedToken(token, self._decoded, self._decoded + len(text)))
        self._decoded += len(text)
        self.token_count += 1
        return self._show(text if self.token_count <= self._min_tokens else self._stops.add(text))

    def finish(self) -> Shown:
        """Whatever was held back, when no more tokens follow."""
        text = self._stops.add(self._detokenizer.finish())
        if not self.stopped:
            text += self._stops.finish()
        self._shown += len(text)
        tokens = tuple(placed for placed in self._pending if not self.stopped or placed.start < self._shown)
        self._pending.clear()
        return Shown(text, tokens)

    def _show(self, text: str) -> Shown:
        self._shown += len(text)
        ready = [placed for placed in self._pending if placed.end <= self._shown or (self.stopped and placed.start < self._shown)]
        if self.stopped:
            self._pending.clear()
        else:
            del self._pending[: len(ready)]
        return Shown(text, tuple(ready))
