"""Stop strings, found wherever they lie across token borders.

Text that may be the start of a stop string is held back until the next text decides, so that nothing of a stop string is ever sent.
"""

from collections.abc import Sequence


class StopStrings:
    """Fed with text in pieces; gives out what is certainly not part of a stop string. The earliest match in the text wins.

    `stops` are non-empty. After `add` has returned with `matched` true, nothing more may be added.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def add(self, text: str) -> str:
        """The text that may go out now."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
