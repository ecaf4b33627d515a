"""A variant whose method trains: a killed try leaves how far it was, the next one goes on from there, and nothing is left at the end."""

import shutil
from pathlib import Path

import pytest

from model_store.store import Store
from quantizers.pipeline import Progress
from server.calibration import CalibrationOptions
from server.quantizing import make_variant

SLUG = "zeroquant.steps60-w4g64a8"


class Killed(Exception):
    pass


def test_the_second_try_goes_on(small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data / "checkpoints", tmp_path / "checkpoints")
    shown, seen = CalibrationOptions(samples=8, length=32), list[Progress]()

    def until(progress: Progress) -> None:
        if progress.stage == "train" and progress.done == 112:  # step 52 of the second block
            raise Killed

    with Store(tmp_path) as store:
        with pytest.raises(Killed):
            make_variant(store, "tiny", SLUG, device="cpu", progress=until, calibration=shown)
        assert len(list(store.training("tiny", SLUG).glob("*.safetensors"))) == 2
    with Store(tmp_path) as store:
        variant = make_variant(store, "tiny", SLUG, device="cpu", progress=seen.append, calibration=shown)
        assert [progress.done for progress in seen if progress.stage == "train"] == list(range(111, 121))
        assert all(progress.loss is not None for progress in seen if progress.stage == "train")
        assert not store.training("tiny", SLUG).exists()
        assert len(variant.facts["trained"]) == 2
