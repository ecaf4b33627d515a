"""Every family of decoders by every kind of method, from the checkpoint to the model that runs: its logits stay near transformers' own."""

from collections.abc import Callable

import pytest
import torch

from quantizers.linear import QuantizedLinear
from quantizers.model import load_model
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens

# Of the logits' size: the rounding of all layers together, and bf16 between them. Random models double what one layer's rounding is.
LOST = {"rtn-w8g32": 0.04, "gptq-w8g32z": 0.04, "awq-w8g32z": 0.04, "smoothquant-w8a8": 0.08}


@pytest.mark.parametrize("slug", LOST)
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_quantized_model_runs_and_stays_near(family: str, slug: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe, artifact = parse_recipe(slug), MemoryTensors()
    calibration = calibration_tokens(16, 32)
    given = calibration if recipe.needs_calibration else None
    result = quantize(model.config, checkpoint, recipe, artifact.__setitem__, calibration=given)
    loaded = load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="")
    layers = [name for name, module in loaded.model.named_modules() if isinstance(module, QuantizedLinear)]
    assert sorted(layers) == sorted(layer.name for layer in result.layers) and len(layers) >= 8
    expected = model(calibration.tokens).logits
    lost = (loaded.model(calibration.tokens).logits.float() - expected).norm() / expected.norm()
    assert 0 < lost < LOST[slug]
