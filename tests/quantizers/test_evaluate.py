"""Perplexity, KL and agreement against the same figures computed at once in fp64, and what a report may not hide."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from quantizers.calibration import Text
from quantizers.errors import QuantizationFailed
from quantizers.evaluate import decode_speed, evaluate
from quantizers.model import LoadedModel, load_model
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import parse_recipe
from quantizers.report import Report
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import MemoryTensors

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
