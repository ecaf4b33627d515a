"""The native choice of a token against the definition in fp64, and against itself on other processors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.sampling import Filters, choose, log_probabilities
from tests.quantizers.test_native_linear import (
    available,
    restore,  # noqa: F401  after every test here too
)

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native kernels are {library.missing()}")

VOCABS = (1, 2, 15, 16, 17, 63, 64, 65, 1000, 4099)


def masses(logits: torch.Tensor, filters: Filters) -> NDArray[np.float64]:
    """Of each token in fp64, 0 where it is filtered out; of equally likely ones at the border of top-p the first stay."""
    z = (logits.numpy().astype(np.float64) - float(logits.max())) / np.float32(filters.temperature)
    mass = np.exp(np.where(z > -87, z, -np.inf))
    if 0 < filters.top_k < len(z):
        mass = np.where(z >= np.sort(z)[-filters.top_k], mass, 0)
    if filters.top_p < 1:
        order = np.argsort(-mass, kind="stable")
        before = np.concatenate([[0.0], mass[order].cumsum()[:-1]])
        out = order[before >= np.float32(filters.top_p) * mass.sum()]
        mass[out[out != order[0]]] = 0
    return np.where(mass >= np.float32(filters.min_p), mass, 0)


def check(logits: torch.Tensor, filters: Filters, u: float) -> None:
    """The token is the definition's, or one beyond borders that fp32 may have moved by a millionth of the mass."""
    (token,) = choose([logits], [filters], [u])
    assert 0 <= token < len(logits)
    accepted: set[int] = set()
    for shift in (-2e-6, 0.0, 2e-6):
        top_p = min(1.0, max(1e-9, filters.top_p + shift)) if filters.top_p < 1 else 1.0
        for min_p in (filters.min_p, filters.min_p * (1 + shift)):
            mass = masses(logits, filters._replace(top_p=top_p, min_p=min_p))
            cumulative = mass.cumsum()
            if u + 2e-6 >= 1 and mass.any():
                accepted.add(int(np.flatnonzero(mass)[-1]))  # however little it has
            for moved in (-2e-6, 0.0, 2e-6):
                target = min(max(0.0, u + moved), 1 - 1e-12) * cumulative[-1]
                accepted.add(int(np.searchsorted(cumulative, target, side="right")))
    assert min(accepted) <= token <= max(accepted) and logits[token] > -math.inf


@st.composite
def rows(draw: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    vocab = draw(st.sampled_from(VOCABS))
    spread, offset = draw(st.sampled_from([0.0, 0.5, 3.0, 12.0, 60.0])), draw(st.sampled_from([0.0, -500.0]))
    logits = torch.randn(vocab, generator=generator) * spread + offset
    if draw(st.booleans()):
        logits = logits.round()  # many are equal
    if vocab > 2 and draw(st.booleans()):
        logits[torch.randperm(vocab, generator=generator)[: vocab // 2]] = -math.inf
    return logits


FILTERS = st.builds(
    Filters,
    temperature=st.sampled_from([1e-5, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 900, 10**12]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.1, 1.0]),
)
SHARES = st.one_of(st.sampled_from([0.0, math.nextafter(1.0, 0.0)]), st.floats(0, 1, exclude_max=True))


@settings(max_examples=300, deadline=None)
@example(torch.tensor([2.0, 3.7, 3.3, -0.7]), Filters(0.1), math.nextafter(1.0, 0.0))
@given(rows(), FILTERS, SHARES)
def test_the_token_is_the_definitions(logits: torch.Tensor, filters: Filters, u: float) -> None:
    check(logits, filters, u)


@settings(max_examples=60, deadline=None)
@given(rows(), FILTERS, SHARES)
def test_every_instruction_set_chooses_the_same(logits: torch.Tensor, filters: Filters, u: float) -> None:
    found = set()
    for isa in available():
        library.select_instruction_set(isa)
        found.add(choose([logits], [filters], [u])[0])
    assert len(found) == 1


@pytest.mark.parametrize(
    "filters",
    [Filters(1.0), Filters(0.7, top_p=0.9), Filters(1.0, top_k=40), Filters(1.0, min_p=0.05), Filters(1.0, top_k=2000, top_p=0.999)],
)
def test_a_real_vocabulary(filters: Filters) -> None:
    logits = torch.randn(49152, generator=torch.Generator().manual_seed(3)) * 3
    for u in np.linspace(0, 0.9999, 60):
        check(logits, filters, float(u))


def test_draws_are_distributed_as_the_masses() -> None:
    """Evenly spread numbers meet each token as often as its share says."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(5)) * 2
    filters, count = Filters(0.8, top_p=0.95), 20000
    tokens = choose([logits] * count, [filters] * count, [(i + 0.5) / count for i in range(count)])
    expected = masses(logits, filters)
    expected *= count / expected.sum()
    assert np.abs(np.bincount(tokens, minlength=300) - expected).max() <= 1.01


def test_of_equally_likely_tokens_top_p_keeps_the_first() -> None:
    tokens = choose([torch.zeros(1000)] * 10, [Filters(1.0, top_p=0.1)] * 10, [i / 10 for i in range(10)])
    assert tokens == [10 * i for i in range(10)]


@pytest.mark.parametrize("filters", [Filters(1.0), Filters(1.0, top_k=3), Filters(1.0, top_p=0.5), Filters(1.0, min_p=0.1)])
@pytest.mark.parametrize("vocab", [1, 40, 1000])
def test_rows_that_leave_no_token(filters: Filters, vocab: int) -> None:
    for bad in (math.nan, math.inf):
        for place in {0, vocab // 2, vocab - 1}:
            logits = torch.zeros(vocab)
            logits[place] = bad
            assert choose([logits], [filters], [0.5]) == [-1]
    assert choose([torch.full((vocab,), -math.inf)], [filters], [0.5]) == [-1]


def test_what_is_banned_is_never_drawn() -> None:
    logits = torch.full((200,), -math.inf)
    logits[77] = -300.0
    for u in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        for filters in (Filters(2.0), Filters(2.0, top_k=150), Filters(2.0, top_p=0.9999)):
            assert choose([logits], [filters], [u]) == [77]


def test_rows_of_different_vocabularies_in_one_call() -> None:
    logits = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (5000, 3, 70000, 64)]
    filters = [Filters(1.0, top_p=0.8), Filters(0.5), Filters(1.5, top_k=9), Filters(1.0, min_p=0.3)]
    alone = [choose([row], [one], [0.4])[0] for row, one in zip(logits, filters, strict=True)]
    assert choose(logits, filters, [0.4] * 4) == alone


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from([0, 1, 5, 20, 10**6]), st.integers(1, 20))
def test_log_probabilities_are_those_of_fp64(row: torch.Tensor, top: int, count: int) -> None:
    """Many rows are shared out to threads; of equally likely tokens the first come first."""
    logits = torch.stack([row.roll(shift) for shift in range(count)])
    expected = logits.double().log_softmax(-1).numpy()
    tokens = [shift * 7 % len(row) for shift in range(count)]
    own, ids, values = log_probabilities(logits, tokens, top)
    assert np.allclose(own, expected[np.arange(count), tokens], rtol=1e-6, atol=1e-6)
    most = min(top, len(row))
    assert ids.shape == values.shape == (count, most)
    best = np.argsort(-(logits.numpy() - logits.numpy().max(-1, keepdims=True)), axis=-1, kind="stable")[:, :most]
    assert (ids == best).all()
    assert np.allclose(values, np.take_along_axis(expected, best, -1), rtol=1e-6, atol=1e-6)


def test_log_probabilities_are_the_same_everywhere() -> None:
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)) * 4
    found = set()
    for isa in available():
        for threads in (1, 3):
            library.select_instruction_set(isa)
            torch.set_num_threads(threads)
            own, ids, values = log_probabilities(logits, list(range(40)), 7)
            found.add((tuple(own), ids.tobytes(), values.tobytes()))
    assert len(found) == 1


def test_log_probabilities_of_what_is_no_distribution() -> None:
    logits = torch.zeros(3, 70)
    logits[0, 69], logits[1], logits[2, 5] = math.nan, -math.inf, math.inf
    own, ids, values = log_probabilities(logits, [0, 1, 5], 3)
    assert np.isnan(own).all() and np.isnan(values).all() and ((ids >= 0) & (ids < 70)).all()
