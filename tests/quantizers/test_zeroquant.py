"""ZeroQuant's distillation: it steps, lowers the error that it trains on, is never worse than its own rounding, and goes on when killed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantizers.errors import QuantizationFailed, UnknownRecipe, UnsupportedScheme
from quantizers.grid import as_groups, range_grid
from quantizers.methods.zeroquant import ZeroQuant
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import IntegerScheme, parse_scheme
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens, killed_and_resumed

SAMPLES = 32
FORMAT = "w3g32a8"


def recipe_of(**options: float) -> Recipe:
    return Recipe(methods=(ZeroQuant(**options),), scheme=parse_scheme(FORMAT))


def test_distillation_lowers_the_blocks_error_on_held_tokens_too(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZeroQuant, "chunk_tokens", 96)
    model, checkpoint = tiny("llama")
    seen: list[Progress] = []
    calibration = calibration_tokens(SAMPLES, 48)
    result = quantize(
        model.config, checkpoint, recipe_of(learning_rate=0.01), MemoryTensors().__setitem__, calibration=calibration, progress=seen.append
    )
    assert [loss.block for loss in result.trained] == ["model.layers.0", "model.layers.1"]
    for loss in result.trained:
        assert loss.kept and loss.steps == 100
        assert loss.after < 0.8 * loss.before and loss.held_after < 0.9 * loss.held_before
    training = [progress for progress in seen if progress.stage == "train"]
    assert [progress.done for progress in training] == list(range(1, 201)) and training[-1].total == 200
    assert all(progress.loss is not None and progress.loss > 0 for progress in training)


def test_a_block_that_training_made_worse_keeps_its_rounded_weights(tiny: Callable) -> None:
    """A learning rate that shakes every weight: what is left is what rounding alone gives."""
    model, checkpoint = tiny("llama")
    sink = MemoryTensors()
    shaken = recipe_of(learning_rate=1, steps=8)
    result = quantize(model.config, checkpoint, shaken, sink.__setitem__, calibration=calibration_tokens())
    assert [loss.kept for loss in result.trained] == [False, False]
    assert all(loss.held_after > loss.held_before for loss in result.trained)
    scheme = parse_scheme("w3g32")
    assert isinstance(scheme, IntegerScheme) and len(result.layers) == 14
    for layer in result.layers:
        weight = checkpoint[f"{layer.name}.weight"]
        grouped = as_groups(weight, scheme, layer.name)
        grid = range_grid(grouped, scheme, layer.name)
        rounded = grid.weight(grid.codes(grouped).view(weight.shape))
        assert all(torch.equal(sink[f"{layer.name}.{name}"], tensor) for name, tensor in rounded.tensors.items())


def test_a_killed_job_goes_on_and_ends_in_the_same_numbers(tiny: Callable, tmp_path: Path) -> None:
    model, checkpoint = tiny("llama")
    recipe = recipe_of(learning_rate=0.01, steps=60)
    at = lambda progress: progress.done == 112  # noqa: E731  step 52 of the second block
    _, steps = killed_and_resumed(model.config, checkpoint, recipe, calibration_tokens(), tmp_path, at)
    assert steps == list(range(111, 121))


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_trains(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe = recipe_of(learning_rate=0.003, steps=12)
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=calibration_tokens(8, 24, padded=True))
    assert len(result.trained) == 2 and all(loss.after < loss.before for loss in result.trained)


def test_a_run_that_diverges_names_the_block(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = tiny("llama")
    norm = checkpoint["model.layers.1.input_layernorm.weight"] = checkpoint["model.layers.1.input_layernorm.weight"].clone()
    norm[5] = 1e38  # finite, and its products are not
    with pytest.raises(QuantizationFailed, match=r"^model\.layers\.1"):
        quantize(model.config, checkpoint, recipe_of(steps=3), MemoryTensors().__setitem__, calibration=calibration_tokens())


@pytest.mark.parametrize("slug", ["zeroquant-w4g64z", "zeroquant-w4g64m", "zeroquant-nf4", "zeroquant-fp16"])
def test_formats_that_it_cannot_make_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match="zeroquant makes symmetric integer formats such as w4g64a8"):
        parse_recipe(slug)


@pytest.mark.parametrize("option", ["steps0", "learningrate0", "learningrate2", "epochs1"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UnknownRecipe, match="zeroquant"):
        parse_recipe(f"zeroquant.{option}-w4g64a8")
