"""Perplexity, KL and agreement against the same figures computed at once in fp64, and what a report may not hide."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from quantizers.calibration import Text
from quantizers.errors import QuantizationFailed
from quantizers.evaluate import ModelExecution, decode_speed, evaluate
from quantizers.model import LoadedModel, load_model, load_reference
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import parse_recipe
from quantizers.report import Report
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import MemoryTensors, calibration_tokens

TEXT = Text("counting", "one two three")
WINDOWS = torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def models(tiny: Callable) -> tuple[PreTrainedModel, dict[str, LoadedModel]]:
    reference, checkpoint = tiny("llama")
    with torch.no_grad():
        for parameter in reference.parameters():  # of random weights as small as transformers draws them, every distribution is flat
            parameter.mul_(4)
    loaded = {}
    for slug in ("fp32", "rtn-w4g32"):
        artifact = None if slug == "fp32" else MemoryTensors()
        if artifact is not None:
            quantize(reference.config, checkpoint, parse_recipe(slug), artifact.__setitem__)
        loaded[slug] = load_model(
            reference.config, parse_recipe(slug), checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="checkpoint"
        )
    return reference, loaded


def test_figures_are_those_of_the_definitions(models: tuple[PreTrainedModel, dict[str, LoadedModel]]) -> None:
    reference, loaded = models
    steps: list[Progress] = []
    reports = evaluate(reference, loaded, WINDOWS, TEXT, decode_tokens=4, progress=steps.append)
    with torch.no_grad():
        theirs = log_softmax(reference(WINDOWS).logits[:, :-1].double(), -1).flatten(0, 1)
        ours = log_softmax(loaded["rtn-w4g32"].model(WINDOWS).logits[:, :-1].double(), -1).flatten(0, 1)
    labels = WINDOWS[:, 1:].flatten()
    divergences = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    report = reports["rtn-w4g32"]
    assert report.perplexity == pytest.approx(ours.gather(1, labels[:, None]).mean().neg().exp().item(), rel=1e-3)
    assert report.kl_divergence == pytest.approx(divergences.mean().item(), rel=1e-2) and report.kl_divergence > 0.01
    assert report.kl_divergence_p99 == pytest.approx(divergences.quantile(0.99).item(), rel=2e-2)
    assert report.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(), abs=0.01)
    assert report.bytes == loaded["rtn-w4g32"].bytes and report.kernels == loaded["rtn-w4g32"].kernels
    assert (report.windows, report.window_tokens, report.text_sha256) == (3, 48, TEXT.sha256)
    assert steps[-1].done == steps[-1].total == 5 and {step.stage for step in steps} == {"quality", "speed"}


@pytest.fixture
def smoothed(tiny: Callable) -> tuple[PreTrainedModel, dict[str, LoadedModel], dict[str, LoadedModel]]:
    """A model whose first normalization makes one channel twenty times as wide as the others, and two w8a8 variants of it: as served,
    and in reference arithmetic."""
    reference, checkpoint = tiny("llama")
    with torch.no_grad():
        reference.model.layers[0].input_layernorm.weight[7] *= 20
    variants, exact = {}, {}
    for slug in ("rtn-w8a8", "smoothquant-w8a8"):
        artifact, recipe = MemoryTensors(), parse_recipe(slug)
        tokens = calibration_tokens() if recipe.needs_calibration else None
        quantize(reference.config, checkpoint, recipe, artifact.__setitem__, calibration=tokens)
        shared = {"device": "cpu", "shared": SharedTensors(), "checkpoint_key": "checkpoint"}
        variants[slug] = load_model(reference.config, recipe, checkpoint, artifact, **shared)
        exact[slug] = load_reference(reference.config, recipe, checkpoint, artifact, **shared)
    return reference, variants, exact


def test_a_profile_shows_an_outlier_and_what_smoothing_makes_of_it(
    smoothed: tuple[PreTrainedModel, dict[str, LoadedModel], dict[str, LoadedModel]],
) -> None:
    reference, variants, exact = smoothed
    reports = evaluate(reference, variants, WINDOWS, TEXT, exact=exact, decode_tokens=1)
    profile = reports["smoothquant-w8a8"].profile
    assert profile is not None and profile.after is not None
    # Four inputs a block: of q, k and v; of o; of gate and up; of down.
    names = [each.layer.removeprefix("model.layers.") for each in profile.before.inputs]
    assert names[:4] == ["0.self_attn.q_proj", "0.self_attn.o_proj", "0.mlp.gate_proj", "0.mlp.down_proj"] and len(names) == 8
    seen = []
    with torch.no_grad(), reference.model.layers[0].input_layernorm.register_forward_hook(lambda _, __, out: seen.append(out)):
        for window in WINDOWS:
            reference(window[None])
    largest = torch.cat(seen).abs().amax((0, 1))
    assert profile.before.widest == "model.layers.0.self_attn.q_proj"
    assert torch.tensor(profile.before.channels).allclose(largest) and int(largest.argmax()) == 7
    assert profile.before.inputs[0].outlier == pytest.approx(float(largest.max() / largest.median()), rel=1e-5)
    assert profile.after.inputs[0].outlier < profile.before.inputs[0].outlier / 2
    assert reports["rtn-w8a8"].profile.after is None and reports["rtn-w8a8"].profile.before == profile.before


def test_errors_of_blocks_are_those_of_the_definition(
    smoothed: tuple[PreTrainedModel, dict[str, LoadedModel], dict[str, LoadedModel]],
) -> None:
    reference, variants, exact = smoothed
    profile = evaluate(reference, variants, WINDOWS, TEXT, exact=exact, decode_tokens=1)["rtn-w8a8"].profile
    with torch.no_grad():
        theirs = reference(WINDOWS, output_hidden_states=True).hidden_states[1]
        ours = exact["rtn-w8a8"].model(WINDOWS, output_hidden_states=True).hidden_states[1]
    expected = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean().sqrt()
    assert profile.block_errors[0] == pytest.approx(float(expected), rel=1e-3) and len(profile.block_errors) == 2


def test_a_report_says_how_far_the_kernels_are_from_reference_arithmetic(models: tuple[PreTrainedModel, dict[str, LoadedModel]]) -> None:
    reference, loaded = models
    variant = {"rtn-w4g32": loaded["rtn-w4g32"]}
    report = evaluate(reference, variant, WINDOWS, TEXT, exact=variant, decode_tokens=1)["rtn-w4g32"]
    assert report.reference_kl_divergence == report.kl_divergence and report.kernel_difference == 0
    with torch.no_grad():
        theirs = log_softmax(reference(WINDOWS).logits[:, :-1].double(), -1).flatten(0, 1)
    report = evaluate(reference, variant, WINDOWS, TEXT, executions={"rtn-w4g32": Sharper(variant["rtn-w4g32"])}, exact=variant)[
        "rtn-w4g32"
    ]
    with torch.no_grad():
        ours = log_softmax(1.1 * variant["rtn-w4g32"].model(WINDOWS).logits[:, :-1].double(), -1).flatten(0, 1)
    served = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean().item()
    assert report.kl_divergence == pytest.approx(served, rel=1e-2) and report.kernels == {"sharper": 1}
    assert (
        report.kernel_difference == pytest.approx(served / report.reference_kl_divergence - 1, abs=0.03) and report.kernel_difference != 0
    )
    assert report.decode_tokens_per_second == 7


class Sharper:
    """An execution whose logits are all a tenth too large."""

    kernels: ClassVar[dict[str, int]] = {"sharper": 1}

    def __init__(self, loaded: LoadedModel) -> None:
        self._own = ModelExecution(loaded)

    def logits(self, window: torch.Tensor) -> torch.Tensor:
        return self._own.logits(window) * 1.1

    def decode_speed(self, prompt: torch.Tensor, tokens: int) -> float:
        return 7.0


def test_the_reference_agrees_with_itself(models: tuple[PreTrainedModel, dict[str, LoadedModel]]) -> None:
    reference, loaded = models
    report = evaluate(reference, {"fp32": loaded["fp32"]}, WINDOWS, TEXT, decode_tokens=2)["fp32"]
    assert (report.kl_divergence, report.kl_divergence_p99, report.top1_agreement) == (0, 0, 1)


def test_logits_that_are_not_finite_fail_with_the_recipes_name(models: tuple[PreTrainedModel, dict[str, LoadedModel]]) -> None:
    reference, loaded = models
    loaded["rtn-w4g32"].model.model.norm.weight = torch.nn.Parameter(torch.full((64,), float("nan"), dtype=torch.bfloat16))
    with pytest.raises(QuantizationFailed, match="rtn-w4g32 gives logits that are not finite"):
        evaluate(reference, loaded, WINDOWS, TEXT)


def test_every_architecture_decodes(family: str, tiny: Callable) -> None:
    model, _ = tiny(family)
    assert decode_speed(model, WINDOWS[0][:8], tokens=3) > 0


def report_of(**changes: Any) -> Report:
    figures = {"perplexity": 10.0, "kl_divergence": 0.1, "kl_divergence_p99": 0.5, "top1_agreement": 0.9, "decode_tokens_per_second": 1.0}
    about = {"recipe": "rtn-w8", "text": "text", "text_sha256": "0" * 64, "windows": 1, "window_tokens": 512, "device": "cpu"}
    return Report(**{**about, **figures, "kernels": {"reference": 1}, "bytes": {"weights": 1}, **changes})


def test_a_report_survives_json() -> None:
    assert Report.model_validate_json(report_of().model_dump_json()) == report_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"perplexity": float("nan")},
        {"kl_divergence": -0.1},
        {"perplexity": float("inf")},
        {"top1_agreement": 1.1},
        {"windows": 0},
        {"x": 1},
    ],
)
def test_a_report_holds_only_figures_that_mean_something(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        report_of(**changes)
