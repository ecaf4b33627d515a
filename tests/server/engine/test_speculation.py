"""What is guessed, how far, and when guessing stops because it does not pay."""

import random

import pytest

from server.engine.speculation import MOST_DRAFTED, Drafting, PromptLookup, StepCost


def test_lookup_continues_what_stood_there_before() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 4) == [4, 5, 9, 1]
    assert lookup.propose([1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8], 4) == []
    assert lookup.propose([1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 2, 3], 2) == [7, 8], "the newest place counts"
    assert PromptLookup().propose([5, 6, 5, 6, 5, 6], 5) == [5, 6, 5, 6, 5], "a loop goes on"
    assert PromptLookup().propose([1], 5) == PromptLookup().propose([], 5) == []


def test_lookup_of_a_growing_text_is_that_of_the_whole() -> None:
    choose = random.Random(0)
    tokens, growing = [choose.randint(0, 3) for _ in range(300)], PromptLookup()
    for length in range(1, 300):
        assert growing.propose(tokens[:length], 3) == PromptLookup().propose(tokens[:length], 3)


def steps(base: float, row: float, noise: float = 0.02) -> StepCost:
    choose, cost = random.Random(1), StepCost()
    for _ in range(200):
        rows = choose.randint(1, 12)
        cost.measured(rows, (base + row * rows) * (1 + choose.uniform(-noise, noise)))
    return cost


@pytest.mark.parametrize(("base", "row", "sequences"), [(10.0, 1.0, 1), (10.0, 1.0, 16), (1.0, 5.0, 1), (5.0, 0.05, 4)])
def test_the_share_that_grows_is_found_from_measured_steps(base: float, row: float, sequences: int) -> None:
    expected = row * sequences / (base + row * sequences)
    assert steps(base, row).growing_share(sequences) == pytest.approx(expected, abs=0.05)


def test_before_anything_was_measured_a_guess_serves() -> None:
    assert StepCost().growing_share(1) == pytest.approx(0.25)
    one = StepCost()
    for _ in range(50):
        one.measured(1, 0.01)  # always the same number of rows: nothing is known of a second one
    assert one.growing_share(1) == pytest.approx(0.25)


def test_right_drafts_grow_and_wrong_ones_end() -> None:
    text = [1, 2, 3, 4] * 50
    good, bad = Drafting(), Drafting()
    for _ in range(60):
        good.verified(4, 4)
        bad.verified(4, 0)
    assert len(good.draft(text, 99, 0.2)) == MOST_DRAFTED
    assert good.draft(text, 3, 0.2) == [1, 2, 3], "no more than is wanted"
    tries = [len(bad.draft(text, 99, 0.2)) for _ in range(200)]
    assert sum(tries) == sum(length > 0 for length in tries) == 4, "one token, now and then"


def test_nothing_is_drafted_where_each_row_costs_a_step() -> None:
    drafting, text = Drafting(), [1, 2, 3, 4] * 50
    assert [drafting.draft(text, 99, 1.0) for _ in range(40)] == [[]] * 40
