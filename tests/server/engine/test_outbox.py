"""Tokens of quick steps go out together, none late and none out of order."""

import time

from server.engine.interface import Finished, Started, Token
from server.engine.messages import Report, StepTokens
from server.engine.outbox import GATHER_SECONDS, Outbox

QUICK = GATHER_SECONDS / 100


def told(said: list[Report]) -> list[object]:
    return [report.tokens if isinstance(report, StepTokens) else report.event for report in said]  # type: ignore[union-attr]


def begun() -> tuple[Outbox, list[Report]]:
    """Of the calls 1 and 2, each of which has its first token."""
    said: list[Report] = []
    box = Outbox(said.append)
    for call in (1, 2):
        box.tell(call, Started(prompt_tokens=3))
        box.tell(call, Token(token_id=call))
    box.flush()
    said.clear()
    return box, said


def test_the_first_token_does_not_wait() -> None:
    said: list[Report] = []
    box = Outbox(said.append)
    box.tell(1, Started(prompt_tokens=3))
    box.tell(1, Token(token_id=7))
    box.before(QUICK)
    assert told(said) == [Started(prompt_tokens=3), ((1, 7),)]
    box.tell(1, Token(token_id=8))
    box.tell(2, Started(prompt_tokens=3))
    box.tell(1, Token(token_id=9))
    box.tell(2, Token(token_id=10))
    box.before(QUICK)
    assert told(said)[2:] == [((1, 8),), Started(prompt_tokens=3), ((1, 9), (2, 10))], "others' tokens go with a first one"


def test_tokens_of_quick_steps_gather() -> None:
    box, said = begun()
    for step in range(3):
        box.tell(1, Token(token_id=10 + step))
        box.tell(2, Token(token_id=20 + step))
        box.before(QUICK)
    assert told(said) == []
    box.before(GATHER_SECONDS)
    assert told(said) == [((1, 10), (2, 20), (1, 11), (2, 21), (1, 12), (2, 22))]
    box.before(None)
    box.flush()
    assert len(said) == 1, "nothing is said twice"


def test_nobody_waits_for_a_step_that_is_slow_or_unknown() -> None:
    box, said = begun()
    for seconds in (None, GATHER_SECONDS * 1.01):
        box.tell(1, Token(token_id=10))
        box.before(seconds)
        assert told(said) == [((1, 10),)]
        said.clear()


def test_the_oldest_token_counts() -> None:
    box, said = begun()
    box.tell(1, Token(token_id=10))
    time.sleep(1.5 * GATHER_SECONDS)
    box.tell(1, Token(token_id=11))
    box.before(QUICK)
    assert told(said) == [((1, 10), (1, 11))]


def test_an_end_overtakes_no_token() -> None:
    box, said = begun()
    box.tell(1, Token(token_id=10))
    end = Finished(reason="length", prompt_tokens=3, completion_tokens=2)
    box.tell(1, end)
    assert told(said) == [((1, 10),), end]
    box.tell(1, Started(prompt_tokens=3))
    box.tell(1, end.model_copy(update={"completion_tokens": 0}))
    box.tell(1, Token(token_id=10))
    box.before(QUICK)
    assert len(said) == 4, "a call that ended without a token waits for none"
