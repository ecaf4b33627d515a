"""`precis evaluate` over a small checkpoint: what it stores is what it measured, through what serves."""

import json
from pathlib import Path

import pytest

from model_store.store import Store
from quantizers.report import Profile, Report
from server.cli import main


def test_evaluate_stores_what_it_prints(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = ("bf16", "rtn-w8a8", "smoothquant-w8a8")
    assert main(["evaluate", "tiny", *recipes, "--windows", "2", "--json", "--data-dir", str(small_data)]) == 0
    printed = {each["recipe"]: Report.model_validate(each) for each in json.loads(capsys.readouterr().out)}
    assert tuple(printed) == recipes
    with Store(small_data) as store:
        for slug, report in printed.items():
            variant = store.variants.get("tiny", slug)
            profile = None if variant.profile is None else Profile.model_validate(variant.profile)
            assert Report.model_validate({**(variant.report or {}), "profile": profile}) == report
            assert all(kernel.startswith("native-step/") for kernel in report.kernels), "measured is what serves"
            assert (report.quantization is None) == (slug == "bf16")
            if report.quantization is not None:
                assert report.quantization.seconds == variant.facts["seconds"] > 0
    assert printed["bf16"].profile is None and printed["bf16"].kernel_difference is None
    smoothed = printed["smoothquant-w8a8"]
    assert abs(smoothed.kernel_difference or 1) < 0.5, "a bf16 model and its fp32 arithmetic lose about the same"
    assert smoothed.profile is not None and smoothed.profile.after is not None
    assert smoothed.profile.after.inputs[0].outlier < smoothed.profile.before.inputs[0].outlier / 2
