"""The canary: what is recorded is what an independent run of the numbers gives, and a variant that computes something else never serves."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from model_store.store import Store
from model_store.variants import Variant
from quantizers.canary import TOKENS, Canary, check, record
from quantizers.errors import CorruptData, QuantizationFailed
from server.engine.interface import VariantKey, VariantSpec
from server.engine.loading import FolderLoader
from server.exporting import export
from server.quantizing import make_variant

SLUG = "rtn-w4g32"


@pytest.fixture
def store(small_data: Path, tmp_path: Path) -> Iterator[Store]:
    """The small checkpoint with weights four times as large: as transformers draws them, every distribution is flat, and nothing shows."""
    folder = tmp_path / "loud"
    folder.mkdir()
    with Store(small_data) as small:
        source = small.checkpoints.get("tiny").dir
    for path in source.iterdir():
        if path.name == "model.safetensors":
            tensors = {name: tensor * (4 if tensor.dim() == 2 else 1) for name, tensor in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.name != "checkpoint.json":
            (folder / path.name).write_bytes(path.read_bytes())
    with Store(tmp_path / "data") as opened:
        opened.checkpoints.import_folder("loud", folder)
        yield opened


def made(store: Store, slug: str = SLUG) -> Variant:
    return make_variant(store, "loud", slug, device="cpu", progress=lambda _: None)


def load(store: Store, variant: Variant) -> None:
    spec = VariantSpec(
        key=VariantKey(model="loud", precision=variant.slug),
        checkpoint_dir=str(store.checkpoints.get("loud").dir),
        artifact_dir=str(variant.dir),
    )
    FolderLoader(torch.device("cpu")).load(spec).close()


def test_what_is_recorded_is_what_transformers_computes_of_the_numbers(store: Store, tmp_path: Path) -> None:
    variant = made(store)
    canary = Canary.model_validate(variant.canary)
    checkpoint = store.checkpoints.get("loud")
    export(checkpoint, variant.recipe, variant.tensors(), tmp_path / "out", dtype="fp32", progress=lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.tensor(canary.tokens)
    with torch.no_grad():
        theirs = log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(canary.logprobs), theirs, rtol=1e-4, atol=1e-4)
    assert len(canary.tokens) <= TOKENS and 0 < canary.noise < 0.5


@pytest.mark.parametrize("slug", [SLUG, "rtn-w8a8", "bnb-nf4", "rtn-w2g32z-head8"])
def test_a_variant_as_it_was_made_loads(slug: str, store: Store) -> None:
    load(store, made(store, slug))


def test_codes_that_changed_on_the_disk_do_not_serve(store: Store) -> None:
    variant = made(store)
    path = variant.dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name.endswith(".codes"):
            begin, end = entry["data_offsets"]
            codes = torch.frombuffer(data, dtype=torch.uint8)[8 + size + begin : 8 + size + end]
            codes.copy_(codes.flip(0))
    path.write_bytes(data)
    with pytest.raises(CorruptData, match=rf"loud@{SLUG} does not compute what was quantized.*off by .* nats.*quantize it again"):
        load(store, variant)


def test_kernels_that_compute_something_else_do_not_serve(store: Store) -> None:
    """As a wrong kernel would be seen: other log-probabilities than the recorded ones."""
    variant = made(store)
    canary = Canary.model_validate(variant.canary)
    shifted = {**canary.model_dump(), "logprobs": [min(0.0, value - canary.allowed - 0.1) for value in canary.logprobs]}
    store.variants.set_canary("loud", SLUG, shifted)
    with pytest.raises(CorruptData, match="does not compute what was quantized"):
        load(store, variant)


@pytest.mark.parametrize("canary", [{}, {"tokens": [1, 2], "logprobs": [0.5], "noise": 0}, {"tokens": "x"}])
def test_a_canary_that_cannot_be_read_is_named(canary: dict[str, Any], store: Store) -> None:
    variant = made(store)
    store.variants.set_canary("loud", SLUG, canary)
    with pytest.raises(CorruptData, match=rf"canary in the manifest of loud@{SLUG} cannot be read"):
        load(store, variant)


def test_a_manifest_that_is_no_json_is_named(store: Store) -> None:
    variant = made(store)
    (variant.dir / "manifest.json").write_text("[")
    with pytest.raises(CorruptData, match=f"manifest of loud@{SLUG} is no JSON object"):
        load(store, variant)


def test_numbers_that_are_not_finite_are_refused_on_both_ends() -> None:
    good, bad = torch.zeros(3, 5), torch.full((3, 5), float("nan"))
    with pytest.raises(QuantizationFailed, match="not finite"):
        record([1, 2, 3], good, bad)
    canary = record([1, 2, 3], good, good)
    assert canary.logprobs == pytest.approx([-torch.log(torch.tensor(5.0)).item()] * 2) and canary.noise == 0
    with pytest.raises(CorruptData, match="any@rtn-w8 gives logits that are not finite"):
        check(canary, bad, "any@rtn-w8")
    check(canary, good, "any@rtn-w8")


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": (1,), "logprobs": ()}, {"logprobs": (-1.0,)}, {"logprobs": (-1.0, float("nan"))}, {"logprobs": (-1.0, 0.1)}, {"noise": -1}],
)
def test_a_canary_holds_a_log_probability_for_every_token_but_the_first(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Canary(**{"tokens": (1, 2, 3), "logprobs": (-1.0, -2.0), "noise": 0.0, **wrong})
