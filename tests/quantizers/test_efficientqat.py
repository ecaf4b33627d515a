"""EfficientQAT: blocks learn on what the quantized blocks before them leave, at any start, in every format; and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed, UnknownRecipe, UnsupportedScheme
from quantizers.methods.efficientqat import EfficientQat
from quantizers.model import load_model
from quantizers.pipeline import quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import parse_scheme
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens, killed_and_resumed
from tests.quantizers.test_gptq import with_weights

FAST = {"weight_rate": 0.01, "grid_rate": 0.01, "end_epochs": 0}


def recipe_of(slug: str, **options: object) -> Recipe:
    return Recipe(methods=(EfficientQat(**{"start": "rtn", **options}),), scheme=parse_scheme(slug))


@pytest.mark.parametrize("slug", ["w2g32", "w2g64z", "w3g32m", "w4", "w3g32a8"])
def test_every_format_learns_from_rounding(slug: str, tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe = recipe_of(slug, epochs=20, **FAST)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(12, 24))
    assert len(result.trained) == 2 and all(loss.after < loss.before for loss in result.trained)


@pytest.mark.parametrize(
    ("start", "slug"), [("gptq", "w3g32"), ("gptq", "w2g32z"), ("gptq", "w3g32m"), ("rtn", "w2g32z"), ("hqq", "w3g32m")]
)
def test_training_begins_at_what_the_start_chooses_and_leaves_the_block_as_it_was(start: str, slug: str, tiny: Callable) -> None:
    """With rates next to zero nothing moves: both blocks are the start's, the second from the streams that the first left."""
    model, checkpoint = tiny("llama")
    ours, theirs = MemoryTensors(), MemoryTensors()
    calibration = calibration_tokens(8, 24)
    still, begun = recipe_of(slug, start=start, weight_rate=0, grid_rate=1e-12, epochs=1, end_epochs=0), parse_recipe(f"{start}-{slug}")
    quantize(model.config, checkpoint, still, ours.__setitem__, calibration=calibration)
    quantize(model.config, checkpoint, begun, theirs.__setitem__, calibration=calibration if begun.needs_calibration else None)
    same = [float((ours[name] == theirs[name]).float().mean()) for name in theirs]
    assert min(same) > 0.99  # packed bytes; sums in another order may move a code


def test_a_killed_job_goes_on_and_ends_in_the_same_numbers(tiny: Callable, tmp_path: Path) -> None:
    model, checkpoint = tiny("llama")
    recipe = recipe_of("w2g32z", epochs=60, **FAST)
    at = lambda progress: progress.done == 115  # noqa: E731  step 55 of the second block
    killed_and_resumed(model.config, checkpoint, recipe, calibration_tokens(12, 24), tmp_path, at)


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_trains(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe = recipe_of("w3g32", epochs=12, **FAST)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(8, 24, padded=True))
    assert len(result.trained) == 2 and all(loss.after < loss.before for loss in result.trained)


def divergence(model: torch.nn.Module, other: torch.nn.Module, tokens: Tensor) -> float:
    """Mean over tokens of KL(model || other)."""
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(each(tokens).logits, -1) for each in (other, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("slug", ["w2g32", "w2g32z", "w3g32m", "w3"])
def test_training_as_a_whole_lowers_the_divergence_and_the_artifact_has_what_was_measured(
    slug: str, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EfficientQat, "chunk_tokens", 192)
    model, checkpoint = tiny("llama")
    calibration, unseen = calibration_tokens(32, 48), calibration_tokens(40, 48).tokens[32:]
    lost = []
    for end_epochs in (0, 10):
        sink, recipe = MemoryTensors(), recipe_of(slug, epochs=4, end_epochs=end_epochs, weight_rate=0.01, grid_rate=0.01, end_rate=0.01)
        result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration)
        artifact = with_weights(model, result, sink, recipe)
        lost.append(divergence(model, artifact, unseen))
        if end_epochs:
            whole = result.trained[-1]
            assert whole.block == "model" and whole.kept and whole.after < whole.before and whole.held_after < whole.held_before
            assert whole.held_after == pytest.approx(divergence(model, artifact, calibration.tokens[-4:]), rel=1e-4)
            weights = {layer.name: layer for layer in result.layers}
            assert len(weights) == 14 and all(0 < layer.relative_error < 1 for layer in result.layers)
    assert lost[1] < 0.9 * lost[0]


def test_integers_and_zeros_stay_while_scales_learn(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    sinks = [MemoryTensors(), MemoryTensors()]
    for sink, end_epochs in zip(sinks, (0, 20), strict=True):
        recipe = recipe_of("w3g32z", epochs=2, end_epochs=end_epochs, end_rate=0.01)
        quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration_tokens(8, 24))
    assert sinks[0].keys() == sinks[1].keys() or set(sinks[0].keys()) == set(sinks[1].keys())
    for name in sinks[0].keys():  # noqa: SIM118
        assert torch.equal(sinks[0][name], sinks[1][name]) != name.endswith(".scale"), name


def test_a_job_killed_while_it_trains_as_a_whole_goes_on(tiny: Callable, tmp_path: Path) -> None:
    model, checkpoint = tiny("llama")
    calibration = calibration_tokens(8, 24, padded=True)
    recipe = recipe_of("w3g32z", epochs=3, end_epochs=60, end_rate=0.01)
    at = lambda progress: progress.total == 60 and progress.done == 57  # noqa: E731
    untouched, steps = killed_and_resumed(model.config, checkpoint, recipe, calibration, tmp_path, at)
    assert not untouched, "nothing is written before the whole is done"
    assert steps == list(range(51, 61))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_trains_as_a_whole(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe = recipe_of("w2g32", epochs=0, end_epochs=12, end_rate=0.01)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(8, 24, padded=True))
    assert result.trained[-1].after < result.trained[-1].before and len(result.trained) == 1


def test_it_composes_with_a_transform_and_with_an_output_matrix(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe = parse_recipe("smoothquant-efficientqat.startrtn.endrate0.01-w8a8-head8")
    sink = MemoryTensors()
    result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration_tokens(8, 24))
    assert len(result.changed) == 4 and all(name in sink for name in result.changed) and "lm_head.codes" in sink
    artifact = load_model(model.config, recipe, checkpoint, sink, device="cpu", shared=SharedTensors(), checkpoint_key="")
    assert divergence(model, artifact.model, calibration_tokens(4, 24).tokens) < 0.01


@pytest.mark.parametrize(("tensor", "layer"), [("model.layers.1.input_layernorm.weight", r"model\.layers\.1"), ("lm_head.weight", "model")])
def test_a_run_that_diverges_names_where(tensor: str, layer: str, tiny: Callable, tmp_path: Path) -> None:
    model, checkpoint = tiny("llama")
    damaged = checkpoint[tensor] = checkpoint[tensor].clone()
    damaged[5] = 1e38  # finite, and its products are not
    sink = MemoryTensors()
    with pytest.raises(QuantizationFailed, match=rf"^{layer}: training diverged: the loss of step 1 of .* is (nan|inf)"):
        recipe = recipe_of("w3g32", epochs=1)
        quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration_tokens(), checkpoints=tmp_path)
    assert not sink, "nothing is written before the whole is done"
    assert (tmp_path / "model.layers.0.safetensors").exists()


@pytest.mark.parametrize("slug", ["efficientqat-nf4", "efficientqat-int8", "efficientqat-fp4"])
def test_formats_that_it_cannot_make_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match="efficientqat makes integer formats such as w2g64"):
        parse_recipe(slug)


def test_a_start_that_cannot_make_the_format_is_refused() -> None:
    with pytest.raises(UnsupportedScheme, match="hqq makes weight-only integer formats with a real minimum"):
        parse_recipe("efficientqat.starthqq-w2g64")


@pytest.mark.parametrize(
    "option",
    [
        "epochs10001",
        "weightrate2",
        "gridrate1e9",
        "startawq",
        "batch4",
        "endrate0",
        "epochs0.endepochs0",
        "weightrate0.gridrate0.endepochs0",
    ],
)
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UnknownRecipe, match="efficientqat"):
        parse_recipe(f"efficientqat.{option}-w2g64")
