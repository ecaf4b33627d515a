"""The ledger: never over its budget, never evicts what is in use, counts what is shared once."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quantizers.errors import OutOfMemory
from server.engine.interface import VariantKey
from server.residency import Claim, Ledger

KEYS = [VariantKey(model="m", precision=f"rtn-w{bits}") for bits in (2, 3, 4, 8)]
A, B, C, D = KEYS
SIZES = st.integers(0, 60)
CLAIMS = st.builds(
    lambda weights, cache, shared: Claim({"weights": weights, "kv_cache": cache}, shared),
    SIZES,
    SIZES,
    st.dictionaries(st.sampled_from(["bf16", "fp32"]), SIZES),
)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls, beside a plain model of what they mean."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(100)
        self.held: dict[VariantKey, Claim] = {}
        self.pins = dict.fromkeys(KEYS, 0)
        self.order: list[VariantKey] = []  # least recently used first

    def used(self, key: VariantKey) -> None:
        self.order = [other for other in self.order if other != key] + [key]

    @rule(key=st.sampled_from(KEYS), claim=CLAIMS)
    def make_room_and_reserve(self, key: VariantKey, claim: Claim) -> None:
        try:
            victims = self.ledger.victims(key, claim)
        except OutOfMemory:
            assert claim.bytes > 100
            return
        if victims is None:
            in_the_way = {other: held for other, held in self.held.items() if self.pins[other] and other != key}
            assert total({**in_the_way, key: claim}) > 100
            with pytest.raises(OutOfMemory):
                self.ledger.reserve(key, claim)
            return
        idle = [other for other in self.order if not self.pins[other] and other != key]
        assert list(victims) == idle[: len(victims)], "the least recently used goes first"
        for victim in victims:
            assert not self.pins[victim]
            if victim == victims[-1]:
                assert total({**self.held, key: claim}) > 100, "nothing goes that could have stayed"
            self.ledger.release(victim)
            del self.held[victim]
            self.order.remove(victim)
        self.ledger.reserve(key, claim)
        self.held[key] = claim
        self.used(key)

    @rule(key=st.sampled_from(KEYS), claim=CLAIMS)
    def reserve(self, key: VariantKey, claim: Claim) -> None:
        try:
            self.ledger.reserve(key, claim)
        except OutOfMemory:
            assert total({**self.held, key: claim}) > 100
        else:
            self.held[key] = claim
            self.used(key)

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: VariantKey) -> None:
        if key in self.held:
            self.ledger.pin(key)
            self.pins[key] += 1
            self.used(key)

    @rule(key=st.sampled_from(KEYS))
    def unpin(self, key: VariantKey) -> None:
        if self.pins[key]:
            self.ledger.unpin(key)
            self.pins[key] -= 1
            self.used(key)

    @invariant()
    def sums_hold(self) -> None:
        assert self.ledger.reserved == total(self.held) <= self.ledger.budget
        assert self.ledger.shared == shared(self.held)
        assert all(self.ledger.pinned(key) == (self.pins[key] > 0) for key in self.held)
        assert all((key in self.ledger) == (key in self.held) for key in KEYS)


def shared(held: dict[VariantKey, Claim]) -> int:
    return sum(max((claim.shared.get(name, 0) for claim in held.values()), default=0) for name in ("bf16", "fp32"))


def total(held: dict[VariantKey, Claim]) -> int:
    return sum(sum(claim.own.values()) for claim in held.values()) + shared(held)


TestLedger = LedgerMachine.TestCase


def test_a_shared_tensor_is_counted_once_until_its_last_user_goes() -> None:
    ledger = Ledger(100)
    ledger.reserve(A, Claim({"weights": 10}, {"bf16": 40}))
    ledger.reserve(B, Claim({"weights": 20}, {"bf16": 40}))
    assert (ledger.reserved, ledger.shared) == (70, 40)
    ledger.release(A)
    assert (ledger.reserved, ledger.shared) == (60, 40)
    ledger.release(B)
    assert (ledger.reserved, ledger.shared) == (0, 0)


def test_evicting_one_user_of_a_shared_tensor_does_not_pretend_to_free_it() -> None:
    ledger = Ledger(100)
    ledger.reserve(A, Claim({"weights": 10}, {"bf16": 40}))
    ledger.reserve(B, Claim({"weights": 10}, {"bf16": 40}))
    assert ledger.victims(C, Claim({"weights": 55})) == (A, B)


def test_recently_used_stays() -> None:
    ledger = Ledger(100)
    for key in (A, B, C):
        ledger.reserve(key, Claim({"weights": 30}))
    ledger.pin(A)
    ledger.unpin(A)
    assert ledger.victims(D, Claim({"weights": 30})) == (B,)


def test_the_error_names_the_numbers() -> None:
    ledger = Ledger(100)
    ledger.reserve(A, Claim({"weights": 70}))
    ledger.pin(A)
    with pytest.raises(
        OutOfMemory, match=r"m@rtn-w3 needs 101 bytes.*budget is 100 bytes, 70 are reserved by 1 variants, 1 of them in use"
    ):
        ledger.victims(B, Claim({"weights": 101}))
    assert ledger.victims(B, Claim({"weights": 50})) is None  # it fits once A is idle
