"""Where half-made variants of methods that train are kept."""

from pathlib import Path

import pytest

from model_store.store import Store
from quantizers.errors import InvalidInput


def test_a_variant_has_its_own_folder_until_it_is_forgotten(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        folder, other = store.training("tiny", "zeroquant-w4g64a8"), store.training("tiny", "zeroquant-w3g64a8")
        assert folder != other and not folder.exists() and tmp_path in folder.parents
        for each in (folder, other):
            each.mkdir(parents=True)
            (each / "block.safetensors").write_text("x")
        store.forget_training("tiny", "zeroquant-w4g64a8")
        store.forget_training("tiny", "zeroquant-w4g64a8")
        assert not folder.exists() and (other / "block.safetensors").exists()
    with Store(tmp_path):
        assert (other / "block.safetensors").exists(), "what a killed process left is what the next one goes on from"


@pytest.mark.parametrize(("name", "slug"), [("..", "rtn-w8"), ("a/b", "rtn-w8"), ("tiny", "../x"), ("tiny", ""), ("", "rtn-w8")])
def test_names_that_lead_elsewhere_are_refused(name: str, slug: str, tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(InvalidInput):
        store.training(name, slug)
