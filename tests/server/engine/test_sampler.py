"""The sampler against transformers' logits processors, and against the distribution that it claims to draw from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantizers.errors import InvalidInput
from server.engine.interface import Sampling
from server.engine.sampler import (
    NonFiniteLogits,
    Sampler,
    apply_count_penalties,
    apply_repetition_penalty,
    check_finite,
    choose,
    decide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    token_logprobs,
    uniform,
)

CPU = torch.device("cpu")
NO_IDS = torch.empty(1, 0, dtype=torch.long)


def logits_of(seed: int, vocab: int = 5000, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sampler_of(vocab: int, prompt: tuple[int, ...] = (0,), end_ids: tuple[int, ...] = (), **options: object) -> Sampler:
    return Sampler(Sampling(max_tokens=1, **options), prompt, end_ids=end_ids, device=CPU)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_transformers(seed: int, penalty: float) -> None:
    logits = logits_of(seed)
    ids = torch.tensor([[3, 3, 17, 4999, 0]])
    seen = ids[0].unique()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])[0]
    torch.testing.assert_close(apply_repetition_penalty(logits, seen, penalty), expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 50, 5000, 10**9])
def test_top_k_is_transformers(seed: int, k: int) -> None:
    logits = logits_of(seed)
    logits[7] = logits[8] = logits.max()  # a tie at the border keeps both
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits[None])[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])  # flat: the nucleus is larger than the first guess; peaked: it is one token
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(seed: int, spread: float, p: float) -> None:
    logits = logits_of(seed, spread=spread)
    ours, theirs = keep_top_p(logits, p).isfinite(), TopPLogitsWarper(p)(NO_IDS, logits[None])[0].isfinite()
    # Both add thousands of fp32 masses, in opposite orders: tokens at the very border may fall on either side.
    assert (ours != theirs).sum() <= max(1, 0.002 * theirs.sum())
    assert ours[logits.argmax()]
    assert torch.equal(keep_top_p(logits, p)[ours], logits[ours])


def test_top_p_by_hand() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert keep_top_p(logits, 0.49).isfinite().tolist() == [True, False, False, False]
    assert keep_top_p(logits, 0.51).isfinite().sum() == 2
    assert keep_top_p(logits, 0.89).isfinite().tolist() == [True, True, True, False]
    assert keep_top_p(logits, 0.95).isfinite().all()


@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.9, 1.0])
def test_min_p_is_transformers(min_p: float) -> None:
    logits = logits_of(1)
    assert torch.equal(keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(NO_IDS, logits[None])[0])


def test_filters_take_leading_dimensions() -> None:
    rows = torch.stack([logits_of(seed) for seed in range(4)])
    for function, argument in ((keep_top_k, 9), (keep_top_p, 0.7), (keep_min_p, 0.05)):
        assert torch.equal(function(rows, argument), torch.stack([function(row, argument) for row in rows]))
    for function, arguments in (
        (keep_top_k, [9, 1, 10**9, 300]),
        (keep_top_p, [0.7, 0.1, 0.9999, 0.5]),
        (keep_min_p, [0.05, 1.0, 0.0, 0.3]),
    ):
        expected = torch.stack([function(row, argument) for row, argument in zip(rows, arguments, strict=True)])
        assert torch.equal(function(rows, torch.tensor(arguments)), expected)


def test_count_penalties_by_hand() -> None:
    tokens, counts = torch.tensor([2, 1]), torch.tensor([3.0, 1.0])
    assert apply_count_penalties(torch.zeros(3), tokens, counts, presence=0.5, frequency=0.25).tolist() == [0.0, -0.75, -1.25]


def test_penalties_of_counts_see_generated_tokens_only() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    sampler = sampler_of(3, prompt=(0, 0, 0), temperature=0, presence_penalty=2.0)
    assert [sampler.next(logits)[0] for _ in range(3)] == [0, 1, 0]  # after 0 and 1 were both drawn, 0 leads again


def test_repetition_penalty_sees_the_prompt_and_what_was_generated() -> None:
    logits = torch.tensor([2.0, 1.5, 1.2])
    sampler = sampler_of(3, prompt=(0,), temperature=0, repetition_penalty=2.0)
    assert [sampler.next(logits)[0] for _ in range(2)] == [1, 2]


def test_whole_chain_draws_from_what_transformers_would() -> None:
    """2,000 draws against the probabilities that transformers' processors leave, by Pearson's chi-square."""
    logits = logits_of(11, vocab=40, spread=2.0)
    prompt = torch.tensor([[1, 5]])
    scores = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits[None])
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        scores = warper(prompt, scores)
    expected = scores.softmax(-1)[0] * 2000
    options = {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    observed = torch.zeros(40)
    for seed in range(2000):
        observed[sampler_of(40, (1, 5), seed=seed, **options).next(logits)[0]] += 1
    assert not observed[expected == 0].any()
    kept = expected > 0
    chi_square = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations; the seeds are fixed, so this never flickers


def test_a_seed_and_an_index_give_one_number_whatever_else_runs() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    numbers = {uniform(seed, index) for seed in (-1, 0, 1, 2**63 - 1, -(2**63)) for index in range(200)}
    assert len(numbers) == 1000
    assert 0.45 < sum(numbers) / 1000 < 0.55
    assert all(0 <= number < 1 for number in numbers)


def test_a_seed_repeats_its_tokens_beside_other_sequences() -> None:
    rows = [logits_of(step, vocab=300, spread=1.0) for step in range(20)]
    alone = sampler_of(300, seed=42)
    first = [alone.next(row)[0] for row in rows]
    again, other = sampler_of(300, seed=42), sampler_of(300, seed=43)
    second, third = [], []
    for row in rows:
        third.append(other.next(row)[0])
        torch.rand(3)
        second.append(again.next(row)[0])
    assert first == second != third


def test_a_row_draws_the_same_in_a_batch_as_alone() -> None:
    """Rows of every kind, one of them broken: each has the token, or the error, that it has on its own."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 2, "top_p": 0.7, "temperature": 0.6},
        {"seed": 3, "top_k": 5, "repetition_penalty": 1.5},
        {"seed": 4, "min_p": 0.1, "frequency_penalty": 1.0},
        {"seed": 5, "logit_bias": {7: 5.0}, "top_p": 0.2, "top_k": 40},
        {"seed": 6, "logprobs": 3},
        {"temperature": 0, "logprobs": 0},
    ]
    together, alone = ([sampler_of(500, (3, 4), **kind) for kind in kinds] for _ in range(2))
    for step in range(10):
        logits = torch.stack([logits_of(100 * step + row, vocab=500) for row in range(len(kinds))])
        assert sample(logits, together) == [sampler.next(row) for sampler, row in zip(alone, logits, strict=True)]
    logits[4, 9] = math.nan
    broken = sample(logits, together)
    assert [isinstance(result, NonFiniteLogits) for result in broken] == [row == 4 for row in range(len(kinds))]


def test_without_a_seed_two_sequences_differ() -> None:
    rows = [logits_of(step, vocab=300, spread=0.1) for step in range(20)]
    first, second = sampler_of(300), sampler_of(300)
    assert [first.next(row)[0] for row in rows] != [second.next(row)[0] for row in rows]


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_choose_never_returns_a_token_without_mass(u: float, seed: int) -> None:
    logits = keep_top_k(logits_of(seed, vocab=64, spread=20.0), 5)
    assert math.isfinite(float(logits[int(choose(logits[None], [u])[0])]))


def test_choose_at_the_ends() -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert choose(logits.expand(4, -1), [0.0, 0.4999, 0.5, math.nextafter(1.0, 0.0)]).tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_no_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(3)
    assert sampler_of(5000, temperature=temperature, seed=1).next(logits)[0] == int(logits.argmax())


def test_min_tokens_bans_the_end_until_then() -> None:
    logits = torch.tensor([5.0, 3.0, 4.0])
    sampler = sampler_of(3, end_ids=(0, 2), temperature=0, min_tokens=2)
    assert [sampler.next(logits)[0] for _ in range(3)] == [1, 1, 0]


def test_logit_bias_moves_the_choice() -> None:
    logits = torch.tensor([5.0, 3.0, 4.0])
    assert sampler_of(3, temperature=0, logit_bias={1: 2.5}).next(logits)[0] == 1
    assert sampler_of(3, temperature=0, logit_bias={0: -100.0}).next(logits)[0] == 2


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = logits_of(2, vocab=100)
    expected = logits.log_softmax(-1)
    sampler = sampler_of(100, temperature=0.3, top_k=1, logit_bias={50: 100.0}, logprobs=3)
    token, logprob = sampler.next(logits)
    assert token == 50
    assert logprob is not None
    assert logprob.token_id == 50
    assert logprob.logprob == pytest.approx(float(expected[50]), abs=1e-5)
    best = expected.topk(3)
    assert [token for token, _ in logprob.top] == best.indices.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_zero_gives_the_token_alone_and_none_gives_nothing() -> None:
    logits = logits_of(2, vocab=100)
    assert sampler_of(100, logprobs=0).next(logits)[1].top == ()  # type: ignore[union-attr]
    assert sampler_of(100).next(logits)[1] is None


def test_token_logprobs_of_rows() -> None:
    rows = torch.stack([logits_of(seed, vocab=50) for seed in range(3)])
    expected = rows.log_softmax(-1)
    found = token_logprobs(rows, [4, 0, 49], 50)
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(expected[row, token]) for row, token in enumerate((4, 0, 49))], abs=1e-5
    )
    assert all(len(entry.top) == 50 for entry in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_logit_is_an_error(bad: float) -> None:
    logits = logits_of(1)
    logits[123] = bad
    with pytest.raises(NonFiniteLogits, match="1 of 5000 logits"):
        check_finite(logits)
    with pytest.raises(NonFiniteLogits):
        sampler_of(5000, temperature=0).next(logits)


def test_options_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(InvalidInput, match="no token is left"):
        sampler_of(3, end_ids=(0, 1, 2), min_tokens=1).next(torch.zeros(3))
    with pytest.raises(InvalidInput, match="repetition_penalty=1e-45"):
        sampler_of(3, prompt=(0,), repetition_penalty=1e-45, temperature=0).next(torch.tensor([5.0, 1.0, 1.0]))


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    logits = logits_of(5, vocab=100).bfloat16()
    token, logprob = sampler_of(100, temperature=0, logprobs=1).next(logits)
    assert logprob is not None
    assert logprob.logprob == pytest.approx(float(logits.float().log_softmax(-1)[token]), abs=1e-5)


def test_nothing_waits_for_the_device_before_the_tokens_are_known() -> None:
    """On the meta device tensors have shapes and no values: what would wait for a GPU fails here."""
    meta = torch.device("meta")
    options = [
        Sampling(max_tokens=4, temperature=0),
        Sampling(max_tokens=4, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=1),
        Sampling(max_tokens=4, temperature=1.3, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={3: 2.0}, min_tokens=2),
        Sampling(max_tokens=4, temperature=1, top_k=3),
    ]
    samplers = [Sampler(each, [1, 2, 2], end_ids={7}, device=meta) for each in options]
    decided = decide(torch.empty(4, 3000, device=meta), samplers)
    assert (decided.shape, decided.dtype, decided.device) == ((3, 4), torch.int64, meta)
    for sampler in samplers:
        sampler.accept(5)


def test_a_spoiled_row_beside_drawn_ones_fails_alone() -> None:
    """What is decided of it means nothing, and must not disturb what is decided beside it."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    options = Sampling(max_tokens=4, temperature=1, top_k=50, top_p=0.9, min_p=0.01, seed=3)
    expected = sample(logits, [Sampler(options, [1], end_ids={7}, device=torch.device("cpu")) for _ in range(4)])
    logits[1], logits[2, 9] = float("nan"), float("inf")
    found = sample(logits, [Sampler(options, [1], end_ids={7}, device=torch.device("cpu")) for _ in range(4)])
    assert [type(found[row]).__name__ for row in (1, 2)] == ["NonFiniteLogits"] * 2
    assert (found[0], found[3]) == (expected[0], expected[3])
