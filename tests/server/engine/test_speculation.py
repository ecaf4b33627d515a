"""What is guessed, how far, and when guessing stops because it does not pay."""

import random

import pytest

from server.engine.speculation import MOST_DRAFTED, Drafting, PromptLookup, StepCost, worthwhile


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


def cost_of(seconds: dict[int, float], noise: float = 0.02) -> StepCost:
    """After many steps of each of these sizes."""
    choose, cost = random.Random(1), StepCost()
    for _ in range(60):
        for rows, each in seconds.items():
            cost.measured(rows, each * (1 + choose.uniform(-noise, noise)))
    return cost


def test_seconds_lie_on_lines_between_what_was_measured() -> None:
    cost = cost_of({1: 2.0, 4: 5.0, 16: 8.0})
    for rows, seconds in {1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 10: 6.5, 16: 8.0}.items():
        assert cost.seconds(rows) == pytest.approx(seconds, rel=0.02)
    assert cost.seconds(32) == pytest.approx(8.0 * 1.25, rel=0.02), "beyond, a quarter of the step is taken to grow"
    assert cost_of({4: 5.0}).seconds(1) == pytest.approx(5.0, rel=0.02), "a smaller step takes no longer"
    assert StepCost().seconds(1) is None


def test_a_time_that_was_an_accident_is_forgotten() -> None:
    cost = StepCost()
    cost.measured(3, 100.0)
    for _ in range(3000):
        cost.measured(1, 1.0)
    assert cost.seconds(3) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("seconds", "right", "sequences", "expected"),
    [
        ({1: 1.0, 9: 1.2}, 0.9, 1, 8),  # rows cost next to nothing
        ({1: 1.0, 9: 9.0}, 0.9, 1, 0),  # every row costs a step
        ({1: 1.0, 2: 1.9, 3: 2.0, 9: 2.6}, 0.5, 1, 0),  # a second row costs nearly a step, which half of the drafts do not bring in
        ({1: 1.0, 2: 1.9, 3: 2.0, 9: 2.6}, 0.95, 1, 8),
        ({4: 1.0, 8: 1.1, 36: 4.0}, 0.5, 4, 1),
        ({1: 1.0, 9: 1.2}, 0.04, 1, 0),  # what is gained is within the margin
    ],
)
def test_as_much_is_drafted_as_pays(seconds: dict[int, float], right: float, sequences: int, expected: int) -> None:
    cost = cost_of(seconds, noise=0.0)
    assert worthwhile(right, MOST_DRAFTED, sequences, cost) == expected
    assert worthwhile(right, 1, sequences, cost) <= 1


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    assert worthwhile(1.0, 8, 1, StepCost()) == 0
    assert Drafting().draft([1, 2, 3, 4] * 50, 8, 1, StepCost()) == []


def test_drafts_begin_once_the_text_follows_what_stood_before() -> None:
    text, cost, drafting = [1, 2, 3, 4] * 50, cost_of({1: 1.0, 9: 1.5}), Drafting()
    lengths = [len(drafting.draft(text[:length], 99, 1, cost)) for length in range(100, 130)]
    assert lengths[-1] == MOST_DRAFTED and lengths == sorted(lengths)
    assert drafting.draft(text[:130], 3, 1, cost) == text[130:133], "no more than is wanted"


def test_a_text_that_goes_on_differently_each_time_pays_nothing() -> None:
    """Pairs that stood there before, never followed by the same: lookup is always wrong, which comparing alone shows."""
    cost, drafting = cost_of({1: 1.0, 2: 1.9, 9: 3.0}), Drafting()
    text, drafted = [1, 2], 0
    for number in range(400):
        text += [1, 2, 100 + number]
        drafted += sum(len(drafting.draft(text[:length], 99, 1, cost)) for length in range(len(text) - 2, len(text) + 1))
    assert drafted == 0


def test_what_was_right_for_long_and_is_not_any_more_ends_soon() -> None:
    cost, drafting, text = cost_of({1: 1.0, 9: 2.0}), Drafting(), [1, 2, 3, 4] * 50
    for length in range(20, 60):
        drafting.draft(text[:length], 99, 1, cost)
    text, drafted = text[:60], 0
    for number in range(60):
        drafted += len(drafting.draft(text, 99, 1, cost)) > 0
        text += [1, 2, 1000 + number]
        drafting.draft(text[:-1], 99, 1, cost)
    assert drafted < 12
