"""Text that the model writes for its own calibration: likely beginnings, then drawn tokens; the same for the same seed."""

from collections.abc import Callable

import pytest
import torch

from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.generated import generate_calibration


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_beginnings_are_greedy_and_tokens_are_the_models_own(family: str, tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's forward pass without a cache says which token is likeliest after each beginning, and that all others are possible."""
    monkeypatch.setattr("quantizers.generated.BATCH_TOKENS", 4 * 12)
    model, _ = tiny(family)
    allowed = torch.arange(96) >= 3
    steps: list[tuple[int, int]] = []
    made = generate_calibration(model, allowed, samples=7, length=12, seed=5, progress=lambda *step: steps.append(step))
    assert made.tokens.shape == (7, 12) and bool(made.mask.all()) and bool(allowed[made.tokens].all())
    assert len(set(made.tokens[:, 0].tolist())) == 7, "every sample begins with another token"
    likeliest = model(made.tokens).logits.masked_fill(~allowed, -torch.inf).argmax(-1)
    for row, until in enumerate((3, 4, 5, 3, 4, 5, 3)):
        assert made.tokens[row, 1:until].equal(likeliest[row, : until - 1])
    drawn = torch.stack(
        [made.tokens[row, until:12][:7] == likeliest[row, until - 1 : 11][:7] for row, until in enumerate((3, 4, 5, 3, 4, 5, 3))]
    )
    assert drawn.float().mean() < 0.9, "the rest is not the likeliest text"
    assert steps[-1] == (84, 84) and steps == sorted(steps)
    assert made.source == "self" and made.facts["seed"] == 5


def test_the_seed_decides(tiny: Callable) -> None:
    model, _ = tiny("llama")
    allowed = torch.ones(96, dtype=torch.bool)
    first, again, other = (generate_calibration(model, allowed, samples=3, length=10, seed=seed) for seed in (0, 0, 1))
    assert first.tokens.equal(again.tokens) and first.sha256 == again.sha256
    assert not first.tokens.equal(other.tokens) and first.sha256 != other.sha256


def test_more_samples_than_tokens_begin_alike(tiny: Callable) -> None:
    model, _ = tiny("llama")
    made = generate_calibration(model, torch.arange(96) < 2, samples=5, length=4, seed=0)
    assert made.tokens[:, 0].tolist() in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])


def test_what_it_cannot_write(tiny: Callable) -> None:
    model, _ = tiny("llama")
    with pytest.raises(InvalidInput, match="no ordinary tokens to begin a text with: calibrate on a file"):
        generate_calibration(model, torch.zeros(96, dtype=torch.bool), samples=1, length=4, seed=0)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(QuantizationFailed, match="logits are not finite"):
        generate_calibration(model, torch.ones(96, dtype=torch.bool), samples=1, length=4, seed=0)
