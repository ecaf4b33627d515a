"""Variants: whole or absent, true to the bytes they were made from."""

import json
import shutil
from pathlib import Path

import pytest

from model_store.checkpoints import Checkpoint
from model_store.store import Store
from model_store.variants import Manifest, Variant
from quantizers.errors import Conflict, CorruptData, InvalidInput, NotFound
from quantizers.recipe import parse_recipe

SLUG = "rtn-w4g64"


@pytest.fixture
def checkpoint(store: Store, tiny: Path) -> Checkpoint:
    return store.checkpoints.import_folder("tiny", tiny)


def manifest(checkpoint: Checkpoint, slug: str = SLUG) -> Manifest:
    facts = {"layers": {"model.layers.0.mlp.up_proj": {"error": 0.01}}, "seconds": 1.5, "peak_bytes": 1 << 20}
    return Manifest(checkpoint=checkpoint.name, checkpoint_digest=checkpoint.digest, recipe=parse_recipe(slug), slug=slug, facts=facts)


def made(store: Store, checkpoint: Checkpoint, slug: str = SLUG) -> Variant:
    with store.variants.create(checkpoint.name, slug) as draft:
        (draft.dir / "model.safetensors").write_bytes(b"quantized")
        return draft.commit(manifest(checkpoint, slug))


def test_a_committed_variant_is_listed_with_its_files_and_recipe(store: Store, checkpoint: Checkpoint) -> None:
    variant = made(store, checkpoint)
    assert variant.id == "tiny@rtn-w4g64"
    assert variant.bytes == len(b"quantized")
    assert variant.recipe == parse_recipe(SLUG) and type(variant.recipe.methods[0]) is type(parse_recipe(SLUG).methods[0])
    assert store.variants.list() == store.variants.list("tiny") == [variant]
    assert store.variants.get("tiny", SLUG) == variant == store.variants.verify("tiny", SLUG)
    assert {path.name for path in variant.dir.iterdir()} == {"model.safetensors", "manifest.json"}


def test_a_draft_that_is_not_committed_leaves_nothing(store: Store, checkpoint: Checkpoint) -> None:
    with pytest.raises(ZeroDivisionError), store.variants.create("tiny", SLUG) as draft:
        (draft.dir / "model.safetensors").write_bytes(b"half")
        raise ZeroDivisionError
    assert not draft.dir.exists()
    assert store.variants.list() == []
    with pytest.raises(NotFound, match="made are: none"):
        store.variants.get("tiny", SLUG)


def test_a_variant_is_made_once(store: Store, checkpoint: Checkpoint) -> None:
    with store.variants.create("tiny", SLUG) as late:
        made(store, checkpoint)
        with pytest.raises(Conflict, match="exists already"):
            late.commit(manifest(checkpoint))
    with pytest.raises(Conflict, match="exists already"), store.variants.create("tiny", SLUG):
        pass
    store.variants.delete("tiny", SLUG)
    made(store, checkpoint)


def test_a_manifest_of_something_else_is_not_committed(store: Store, checkpoint: Checkpoint) -> None:
    with store.variants.create("tiny", SLUG) as draft:
        for wrong in (
            manifest(checkpoint, "rtn-w8"),
            manifest(checkpoint).model_copy(update={"checkpoint": "other"}),
            manifest(checkpoint).model_copy(update={"recipe": parse_recipe("rtn-w8")}),
        ):
            with pytest.raises(InvalidInput, match="the manifest speaks of"):
                draft.commit(wrong)
        with pytest.raises(Conflict, match="was replaced"):
            draft.commit(manifest(checkpoint).model_copy(update={"checkpoint_digest": "0" * 64}))
    assert store.variants.list() == []


def test_a_variant_of_replaced_bytes_counts_no_more_and_can_be_made_anew(
    store: Store, checkpoint: Checkpoint, tiny: Path, tmp_path: Path
) -> None:
    made(store, checkpoint)
    store.checkpoints.delete("tiny")
    assert store.variants.list() == []
    changed = Path(shutil.copytree(tiny, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    replaced = store.checkpoints.import_folder("tiny", changed)
    assert store.variants.list("tiny") == []
    with pytest.raises(NotFound, match="quantize it anew"):
        store.variants.get("tiny", SLUG)
    assert made(store, replaced).checkpoint_digest == replaced.digest
    assert len(store.variants.list()) == 1


def test_report_and_canary_are_added_without_touching_the_rest(store: Store, checkpoint: Checkpoint) -> None:
    variant = made(store, checkpoint)
    store.variants.set_canary("tiny", SLUG, {"token_ids": [1, 2], "logprobs": [-0.1, -0.2]})
    store.variants.set_report("tiny", SLUG, {"perplexity": 12.5})
    found = store.variants.get("tiny", SLUG)
    assert found.report == {"perplexity": 12.5} and found.canary == {"token_ids": [1, 2], "logprobs": [-0.1, -0.2]}
    assert found.model_copy(update={"report": None, "canary": None}) == variant
    store.variants.verify("tiny", SLUG)


def test_changed_bytes_and_broken_manifests_are_named(store: Store, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    variant = made(store, checkpoint)
    (variant.dir / "model.safetensors").write_bytes(b"quantizeD")
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        store.variants.verify("tiny", SLUG)
    (variant.dir / "model.safetensors").unlink()
    with pytest.raises(CorruptData, match="is missing"):
        store.variants.verify("tiny", SLUG)
    path = variant.dir / "manifest.json"
    for content in (b"{", path.read_bytes().replace(b'"rtn"', b'"of-nobody"'), path.read_bytes().replace(b'"tiny"', b'"other"')):
        path.write_bytes(content)
        with pytest.raises(CorruptData, match="delete the variant"):
            store.variants.get("tiny", SLUG)
        assert store.variants.list() == []
        assert "rtn-w4g64 is left out" in caplog.text
        caplog.clear()
        path.write_bytes((variant.model_dump_json(exclude={"dir"})).encode())


@pytest.mark.parametrize("slug", ["", "..", "a/b", "../../x", "A", "x" * 97, "-"])
def test_slugs_that_are_no_folder_names(slug: str, store: Store, checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidInput):
        store.variants.get("tiny", slug)
    with pytest.raises(InvalidInput):
        store.variants.delete("tiny", slug)
    with pytest.raises(InvalidInput), store.variants.create("tiny", slug):
        pass


def test_a_variant_of_no_checkpoint(store: Store) -> None:
    with pytest.raises(NotFound, match="no checkpoint 'tiny'"), store.variants.create("tiny", SLUG):
        pass
