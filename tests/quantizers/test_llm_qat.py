"""LLM-QAT: the whole model learns to bear its rounding, fully or by adapters, and what is stored is what was measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantizers.errors import QuantizationFailed, UnknownRecipe, UnsupportedScheme
from quantizers.kernels.kv_cache import quantize_heads
from quantizers.methods.llm_qat import LlmQat
from quantizers.model import load_reference
from quantizers.pipeline import quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import parse_scheme
from quantizers.shared import SharedTensors
from quantizers.training import cache
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens, killed_and_resumed
from tests.quantizers.test_efficientqat import divergence
from tests.quantizers.test_gptq import with_weights


def recipe_of(slug: str, **options: object) -> Recipe:
    return Recipe(methods=(LlmQat(**options),), scheme=parse_scheme(slug))


@pytest.mark.parametrize(("slug", "options"), [("w3g32a8", {}), ("w3g32za8", {"lora_rank": 8}), ("w3g32m", {}), ("w3a8", {})])
def test_training_lowers_the_divergence_and_the_artifact_has_what_was_measured(
    slug: str, options: dict, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlmQat, "chunk_tokens", 192)
    model, checkpoint = tiny("llama")
    calibration, unseen = calibration_tokens(32, 48), calibration_tokens(40, 48).tokens[32:]
    sink, recipe = MemoryTensors(), recipe_of(slug, epochs=12, learning_rate=0.005, **options)
    result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration)
    (whole,) = result.trained
    assert whole.block == "model" and whole.kept and whole.after < whole.before and whole.held_after < 0.8 * whole.held_before
    artifact = _loaded(model, recipe, checkpoint, sink)
    assert whole.held_after == pytest.approx(divergence(model, artifact, calibration.tokens[-4:]), rel=1e-3)
    rounded, nearest = MemoryTensors(), parse_recipe(f"rtn-{slug}")
    quantize(model.config, checkpoint, nearest, rounded.__setitem__)
    assert divergence(model, artifact, unseen) < 0.8 * divergence(model, _loaded(model, nearest, checkpoint, rounded), unseen)
    assert all(sink[name].shape == rounded[name].shape and sink[name].dtype == rounded[name].dtype for name in rounded), (
        "an ordinary variant"
    )
    assert sink.keys() == rounded.keys() or set(sink.keys()) == set(rounded.keys())


def _loaded(model: torch.nn.Module, recipe: Recipe, checkpoint: MemoryTensors, sink: MemoryTensors) -> torch.nn.Module:
    """As it is served, in fp32 arithmetic."""
    return load_reference(model.config, recipe, checkpoint, sink, device="cpu", shared=SharedTensors(), checkpoint_key="").model


def test_labels_teach_the_text_itself(tiny: Callable) -> None:
    """Random tokens, which the checkpoint knows nothing of: with labels the model comes to expect them, without it does not."""
    model, checkpoint = tiny("llama")
    calibration = calibration_tokens(4, 24, padded=True)
    expected = {}
    for labels in (0, 10):
        sink, recipe = MemoryTensors(), recipe_of("w4g32", epochs=60, learning_rate=0.005, labels=labels)
        result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration)
        log_probabilities = torch.log_softmax(with_weights(model, result, sink, recipe)(calibration.tokens[:1]).logits, -1)
        expected[labels] = float(log_probabilities[0, :-1].gather(-1, calibration.tokens[0, 1:, None]).mean())
    assert expected[10] > expected[0] + 0.2


def test_a_few_samples_are_learnt_by_heart(tiny: Callable) -> None:
    """At 2 bits nothing of the model is left at first; on the text that it is trained on nearly all comes back."""
    model, checkpoint = tiny("llama")
    recipe = recipe_of("w2g32z", epochs=150, learning_rate=0.02)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(2, 24))
    assert result.trained[0].kept and result.trained[0].after < 0.1 * result.trained[0].before


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "labels": 0.5}])
def test_a_killed_job_goes_on_and_ends_in_the_same_numbers(options: dict, tiny: Callable, tmp_path: Path) -> None:
    model, checkpoint = tiny("llama")
    calibration = calibration_tokens(8, 24, padded=True)
    recipe = recipe_of("w3g32a8", epochs=60, **options)
    untouched, steps = killed_and_resumed(model.config, checkpoint, recipe, calibration, tmp_path, lambda progress: progress.done == 57)
    assert not untouched, "nothing is written before training is done"
    assert steps == list(range(51, 61))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_trains(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe = recipe_of("w2g32a8", epochs=12, learning_rate=0.01)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(8, 24, padded=True))
    assert result.trained[0].after < result.trained[0].before


def test_a_run_that_diverges_says_so(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    damaged = checkpoint["lm_head.weight"] = checkpoint["lm_head.weight"].clone()
    damaged[5] = 1e38  # finite, and its products are not
    sink = MemoryTensors()
    with pytest.raises(QuantizationFailed, match=r"^model: training diverged: the loss of step 1 of .* is (nan|inf)"):
        quantize(model.config, checkpoint, recipe_of("w3g32a8"), sink.__setitem__, calibration=calibration_tokens())
    assert not sink


def test_it_composes_with_smoothing(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe, sink = parse_recipe("smoothquant-llm-qat-w4a8"), MemoryTensors()
    result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration_tokens(8, 24))
    assert len(result.changed) == 4 and all(name in sink for name in result.changed)
    measured = divergence(model, _loaded(model, recipe, checkpoint, sink), calibration_tokens(8, 24).tokens)
    assert measured == pytest.approx(min(result.trained[0].held_before, result.trained[0].held_after), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_cache_in_bytes_is_trained_with(family: str, tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is the model over such a cache: attention sees heads that lie on their grids, one for each head and token."""
    seen: list[torch.Tensor] = []
    rounded = cache.rounded_heads
    monkeypatch.setattr(cache, "rounded_heads", lambda x: seen.append(rounded(x)) or seen[-1])
    model, checkpoint = tiny(family)
    recipe = recipe_of("w3g32a8", epochs=12, learning_rate=0.005, int8_cache=True)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(8, 24, padded=True))
    assert result.trained[0].after < result.trained[0].before
    codes, scales = quantize_heads(seen[-1].detach())
    torch.testing.assert_close(codes * scales[..., None], seen[-1].detach(), rtol=1e-5, atol=1e-7)


def test_rounding_heads_has_the_gradient_of_the_identity() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    y = cache.rounded_heads(x)
    assert 0 < (y - x).abs().max() <= (x.abs().amax(-1) / 254).max() * 1.001
    (y * torch.arange(8.0)).sum().backward()
    assert torch.equal(x.grad, torch.arange(8.0).expand_as(x))  # type: ignore[arg-type]


def test_its_name_has_a_hyphen_in_a_slug() -> None:
    recipe = parse_recipe("llm-qat.epochs3.lorarank16.labels0.5.int8cacheon-w4a8-downproj.w8a8")
    assert recipe.methods == (LlmQat(epochs=3, lora_rank=16, labels=0.5, int8_cache=True),) and len(recipe.overrides) == 1
    assert parse_recipe("smoothquant-llm-qat-w4a8").slug == "smoothquant-llm-qat-w4a8"


@pytest.mark.parametrize("slug", ["llm-qat-nf4", "llm-qat-fp8", "llm-qat-int8"])
def test_formats_that_it_cannot_make_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match="llm-qat makes integer formats such as w4a8"):
        parse_recipe(slug)


@pytest.mark.parametrize(
    "slug", ["llm-w4a8", "llm-qat", "qat-w4a8", "llm-qat.epochs0-w4a8", "llm-qat.lorarank-1-w4a8", "llm-qat.labels11-w4a8"]
)
def test_what_is_no_recipe_of_it_is_refused(slug: str) -> None:
    with pytest.raises(UnknownRecipe):
        parse_recipe(slug)
