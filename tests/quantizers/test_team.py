"""The size of the native step's team: follows what the machine has free, and does not waste a step in ten on finding out."""

from hypothesis import given
from hypothesis import strategies as st

from quantizers.kernels.cpu.team import TeamSize

WORK = 0.004  # seconds of one thread a step


class Machine:
    """A clock that steps move. While others use the cores, every thread but the caller's is put off for `put_off` seconds a step."""

    def __init__(self, put_off: float = 0.02) -> None:
        self.now, self.crowded, self.put_off = 0.0, False, put_off
        self.team = TeamSize(lambda: self.now)
        self.sizes: list[int] = []

    def step(self, most: int) -> None:
        threads = self.team.choose(most)
        assert 1 <= threads <= most
        waited = self.put_off if self.crowded and threads > 1 else 0.0001
        seconds = WORK / threads + waited
        self.now += seconds
        self.sizes.append(threads)
        self.team.learn(threads, seconds, waited)

    def run(self, seconds: float, most: int = 2) -> list[int]:
        """The sizes of all steps of so long a time."""
        self.sizes, until = [], self.now + seconds
        while self.now < until:
            self.step(most)
        return self.sizes


def test_a_machine_of_our_own_gives_every_thread_to_every_step() -> None:
    assert set(Machine().run(5)) == {2}


def test_a_crowd_leaves_one_thread_after_two_bad_steps_and_few_trials() -> None:
    machine = Machine()
    machine.crowded = True
    sizes = machine.run(20)
    assert sizes[:3] == [2, 2, 1]
    in_trials = sum(size > 1 for size in sizes) * (WORK / 2 + machine.put_off)
    assert in_trials < 0.05 * 20, "trials take less than a twentieth of the time"


def test_the_team_is_whole_again_within_two_seconds_of_the_crowd_leaving() -> None:
    machine = Machine()
    machine.crowded = True
    machine.run(20, most=8)
    machine.crowded = False
    machine.run(4.5, most=8)  # 1 -> 2 after at most two seconds, then 4 and 8 a quarter of a second each
    assert set(machine.run(1, most=8)) == {8}


def test_one_slow_step_is_an_accident() -> None:
    machine = Machine()
    for bad in (False, True) * 20:
        machine.crowded = bad
        machine.step(2)
    assert set(machine.sizes) == {2}


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), min_size=1, max_size=200))
def test_the_size_is_always_between_one_and_the_most_that_is_allowed(steps: list[tuple[bool, int]]) -> None:
    machine = Machine()
    for crowded, most in steps:
        machine.crowded = crowded
        machine.step(most)
