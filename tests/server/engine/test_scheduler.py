"""The rules of scheduling with a simulated model: no token lost or doubled, nobody starves, no block leaks, whatever is cancelled."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.blocks import BlockPool
from server.engine.scheduler import Limits, Scheduler, Sequence, Step, Work
from server.engine.turns import Turns

SIZE = 4
LIMITS = Limits(step_tokens=12, mixed_tokens=6, sequences=5, scored_tokens=3)


def following(tokens: list[int]) -> int:
    """The simulated model: the next token depends on every one before it."""
    return (sum((index + 1) * token for index, token in enumerate(tokens)) + len(tokens)) % 3


class Model:
    """Remembers what each block holds, as a cache does, and answers from that alone."""

    def __init__(self, blocks: int, limits: Limits = LIMITS) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, SIZE, limits)
        self.limits = limits
        self.cache: dict[int, list[int]] = defaultdict(lambda: [-1] * SIZE)
        self.scores: dict[int, list[int]] = defaultdict(list)  # call -> positions
        self.steps = self.right = self.gone = 0
        self.early = 0  # steps ahead that do not come to pass

    def run(self, ahead: int = 0) -> list[Sequence]:
        """One step, with as many as `ahead` that follow at once; returns the sequences that ended with it."""
        step = self.scheduler.schedule(ahead)
        assert step is not None, "there is work and none is scheduled"
        self.steps += 1
        self.check(step)
        for source, target in step.copies:
            self.cache[target] = list(self.cache[source])
        for work in step.work:
            self.write(work)
        return [work.sequence for work in step.work if self.finish(work)]

    def check(self, step: Step) -> None:
        assert 0 < sum(work.rows for work in step.work) <= self.limits.step_tokens
        assert len({work.sequence.call for work in step.work}) == len(step.work) <= self.limits.sequences
        if any(work.count == 1 and work.sequence.generated for work in step.work):
            read = sum(work.count for work in step.work if not work.sequence.generated)
            assert read <= self.limits.mixed_tokens + self.limits.sequences
        assert all(work.start == work.sequence.computed and work.count > 0 for work in step.work)

    def write(self, work: Work) -> None:
        table = work.sequence.table
        assert table is not None
        tokens = [*work.sequence.tokens, *work.draft]
        while len(tokens) < work.end + work.ahead:
            tokens.append(following(tokens))
        for position in range(work.start, work.end + max(len(work.draft), work.ahead)):
            block = table.blocks[position // SIZE]
            assert self.pool.references(block) == 1
            assert not self.pool.published(block)
            self.cache[block][position % SIZE] = tokens[position]

    def finish(self, work: Work) -> bool:
        sequence, table = work.sequence, work.sequence.table
        assert table is not None
        seen = [self.cache[table.blocks[position // SIZE]][position % SIZE] for position in range(work.end)]
        assert seen == sequence.tokens[: work.end], "the model reads keys and values of other tokens"
        if sequence.scored is not None:
            self.scores[sequence.call] += range(work.logits_from, min(work.end, sequence.prompt_tokens - 1))
        self.scheduler.advance(work)
        if not work.samples:
            return False
        assert work.logits_from < work.end
        right = 0
        sequence.tokens.append(following(sequence.tokens))
        while right < len(work.draft) and work.draft[right] == sequence.tokens[-1]:
            sequence.tokens.append(following(sequence.tokens))
            right += 1
        self.right += right
        for _ in range(work.ahead - self.early):
            sequence.tokens.append(following(sequence.tokens))
            right, self.gone = right + 1, self.gone + 1
        if sequence.generated == sequence.max_tokens:
            self.scheduler.remove(sequence)
            return True
        self.scheduler.confirm(work, right)
        return False

    def room(self) -> int:
        """Steps that may follow the next one: nobody is to have more tokens than it asked for."""
        return min((sequence.max_tokens - sequence.generated - 1 for sequence in self.scheduler.running), default=0)

    def draft(self, choose: random.Random) -> None:
        """Guesses of random lengths for all that run, each token right half of the time."""
        for sequence in self.scheduler.running:
            tokens = list(sequence.tokens)
            for _ in range(min(choose.randint(0, 6), sequence.max_tokens - sequence.generated - 1)):
                tokens.append(following(tokens) if choose.random() < 0.5 else choose.randint(0, 2))
            sequence.draft = tokens[len(sequence.tokens) :]


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(6, 40), st.booleans(), st.booleans())
def test_random_arrivals_and_cancellations(seed: int, blocks: int, drafts: bool, goes_on: bool) -> None:
    choose = random.Random(seed)
    model = Model(blocks)

    def run() -> list[Sequence]:
        if drafts:
            model.draft(choose)
        model.early = choose.choice([0, 0, 1, 2])
        return model.run(choose.randint(0, model.room()) if goes_on else 0)

    prompts: dict[int, list[int]] = {}
    alive: dict[int, Sequence] = {}
    ended: list[Sequence] = []
    for call in range(25):
        prompt = choose.choices([0, 1], k=choose.randint(1, 16))
        if prompts and choose.random() < 0.3:  # another choice of the same prompt
            prompt = prompts[choose.choice(list(prompts))]
        sequence = Sequence(call, list(prompt), choose.randint(1, 24 - len(prompt)), call, scored=choose.choice([None, None, 0]))
        sequence.priority = choose.choice([0, 0, 0, 1])
        if not model.scheduler.fits(sequence.prompt_tokens + sequence.max_tokens):
            continue
        prompts[call], alive[call] = prompt, sequence
        model.scheduler.add(sequence)
        for _ in range(choose.randint(0, 4)):
            if model.scheduler.busy:
                ended += run()
        if choose.random() < 0.2:
            cancelled = choose.choice([other for other in alive.values() if other not in ended] or [sequence])
            if cancelled not in ended:
                model.scheduler.remove(cancelled)
                del alive[cancelled.call]
    while model.scheduler.busy:
        ended += run()
        assert model.steps < 5000, "somebody starves"
    assert sorted(sequence.call for sequence in ended) == sorted(alive)
    for sequence in ended:
        assert sequence.tokens == expected(prompts[sequence.call], sequence.max_tokens)
        if sequence.scored is not None:
            assert model.scores[sequence.call] == list(range(len(prompts[sequence.call]) - 1))
            assert sequence.cached == 0
    assert (model.pool.used, model.scheduler.usage) == (0, 0.0)


def sequence_of(call: int, prompt: int, max_tokens: int, **options: object) -> Sequence:
    return Sequence(call, [call + 10] * prompt, max_tokens, float(call), **options)  # type: ignore[arg-type]


def test_a_long_prompt_is_read_beside_streams_that_go_on() -> None:
    model = Model(40)
    model.scheduler.add(sequence_of(1, 3, 20))
    model.run()
    model.scheduler.add(sequence_of(2, 40, 1))
    for start in range(0, 36, 6):
        step = model.scheduler.schedule()
        assert step is not None
        assert [(work.sequence.call, work.start, work.count) for work in step.work] == [(1, 3 + start // 6, 1), (2, start, 6)]
        for work in step.work:
            model.write(work)
            model.finish(work)


def test_steps_ahead_have_blocks_or_are_none() -> None:
    model = Model(12)
    model.scheduler.add(sequence_of(1, 4, 24))
    model.scheduler.add(sequence_of(2, 4, 8))
    model.run(5)
    assert model.gone == 0, "prompts are read first"
    model.run(3)
    assert model.gone == 6
    model.scheduler.running[0].draft = [0]
    model.run(3)
    assert model.gone == 6, "a draft is verified by itself"
    used = model.pool.used
    assert (step := model.scheduler.schedule(40)) is not None and step.ahead == 0
    assert model.pool.used <= used + 2, "nobody takes what is not there"


def test_the_last_to_come_gives_way_and_comes_back() -> None:
    model = Model(8)
    first, second = sequence_of(1, 8, 16), sequence_of(2, 8, 16)
    model.scheduler.add(first)
    model.scheduler.add(second)
    model.scheduler._guess = 0.0  # nobody foresees how long the answers are
    ended = []
    while model.scheduler.busy:
        ended += model.run()
    assert [sequence.call for sequence in ended] == [1, 2]
    assert model.scheduler.preemptions >= 1
    assert first.tokens == expected([11] * 8, 16)
    assert second.tokens == expected([12] * 8, 16)


def test_admission_foresees_answers_of_the_usual_length() -> None:
    """With the guess of 64 tokens, two sequences that would need 6 blocks each do not start together in a pool of 8."""
    model = Model(8)
    model.scheduler.add(sequence_of(1, 8, 16))
    model.scheduler.add(sequence_of(2, 8, 16))
    while model.scheduler.busy:
        model.run()
    assert model.scheduler.preemptions == 0


def test_priority_then_deadline_then_arrival() -> None:
    model = Model(40, Limits(step_tokens=4, mixed_tokens=4, sequences=1, scored_tokens=4))
    for call, options in enumerate([{}, {"deadline": 50.0}, {"priority": 1}, {"deadline": 20.0}]):
        model.scheduler.add(sequence_of(call, 2, 1, **options))
    assert [sequence.call for _ in range(4) for sequence in model.run()] == [2, 3, 1, 0]


def test_deadlines_are_of_those_that_have_not_begun() -> None:
    model = Model(40, Limits(step_tokens=4, mixed_tokens=4, sequences=1, scored_tokens=4))
    begun, late, later = sequence_of(1, 2, 5, deadline=1.0), sequence_of(2, 2, 5, deadline=2.0), sequence_of(3, 2, 5, deadline=9.0)
    for sequence in (begun, late, later):
        model.scheduler.add(sequence)
    model.run()
    assert model.scheduler.expired(3.0) == [late]


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    model = Model(40)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for call in (1, 2):
        sequence = Sequence(call, list(prompt), 2, call)
        model.scheduler.add(sequence)
        while model.scheduler.busy:
            model.run()
        assert sequence.cached == (0 if call == 1 else 8)


@pytest.mark.parametrize("length", [7, 8, 9, 20])
def test_choices_of_one_prompt_read_it_once_and_hold_its_blocks_together(length: int) -> None:
    """Ends of prompts inside a block, at its end, just behind it, and prompts of two steps."""
    model = Model(60)
    sequences = [Sequence(call, list(range(length)), 6, 0.0) for call in range(4)]
    other = Sequence(9, list(range(length)), 6, 0.0, salt="another key's")
    for sequence in (*sequences, other):
        model.scheduler.add(sequence)
    computed, most = 0, 0
    while model.scheduler.busy:
        step = model.scheduler.schedule()
        assert step is not None
        model.check(step)
        for source, target in step.copies:
            model.cache[target] = list(model.cache[source])
        computed += sum(work.count for work in step.work if not work.sequence.generated)
        for work in step.work:
            model.write(work)
        most = max(most, model.pool.used)
        for work in step.work:
            model.finish(work)
    assert computed == 2 * length + 3, "read once for each salt; three more choices compute their last token"
    assert all(sequence.tokens == expected(list(range(length)), 6) for sequence in (*sequences, other))
    assert [sequence.cached for sequence in sequences] == [0, *[length - 1] * 3] and other.cached == 0
    shared, whole = (length - 1) // SIZE, -(-(length + 5) // SIZE)
    assert most <= 2 * shared + 5 * (whole - shared), "what is not written is not copied"


def test_a_choice_whose_twin_is_cancelled_reads_the_prompt_itself() -> None:
    model = Model(60)
    first, second = Sequence(1, list(range(20)), 6, 0.0), Sequence(2, list(range(20)), 6, 0.0)
    model.scheduler.add(first)
    model.scheduler.add(second)
    model.run()
    model.scheduler.remove(first)
    while model.scheduler.busy:
        model.run()
    assert second.tokens == expected(list(range(20)), 6)


@pytest.mark.parametrize("cost", [(1.0, 1.0), (1.0, 0.01), (0.2, 5.0)])
def test_turns_share_the_time_not_the_steps(cost: tuple[float, float]) -> None:
    turns, spent = Turns[str](0.05), {"a": 0.0, "b": 0.0}
    for _ in range(4000):
        key = turns.next(("a", "b"))
        spent[key] += cost[key == "b"]
        turns.charge(key, cost[key == "b"])
    assert abs(spent["a"] - spent["b"]) <= max(cost) + 0.05


def test_who_comes_back_has_neither_credit_nor_debt() -> None:
    turns = Turns[str](0.05)
    for _ in range(100):
        turns.charge(turns.next(("a",)), 1.0)
    turns.next(("b",))
    order = []
    for _ in range(6):
        order.append(turns.next(("a", "b")))
        turns.charge(order[-1], 0.06)
    assert sorted(order) == ["a", "a", "a", "b", "b", "b"]
