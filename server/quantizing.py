"""One run of a recipe over a stored checkpoint: the quantizers' walk between the store's reader and its writer. Imports torch."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from transformers import AutoConfig

from model_store.formats.safetensors import SafetensorsWriter
from model_store.store import Store
from model_store.variants import Manifest, Variant
from quantizers.errors import InvalidInput, NotFound
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import parse_recipe

__all__ = ["Progress", "ensure_variant", "make_variant", "resolve_device"]


def resolve_device(device: str) -> str:
    """`auto` is the first GPU if there is one. Raises InvalidInput for a GPU that is not there."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch {torch.__version__} sees no GPU here; use cpu or auto", param="device")
    return device


def make_variant(store: Store, checkpoint: str, slug: str, *, device: str, progress: Callable[[Progress], None]) -> Variant:
    """Quantize and commit. Raises Conflict where the variant exists, QuantizationFailed naming the layer, InvalidInput for a baseline."""
    recipe = parse_recipe(slug)
    source = store.checkpoints.get(checkpoint)
    config = AutoConfig.from_pretrained(source.dir, local_files_only=True)
    with store.variants.create(checkpoint, slug) as draft:
        with SafetensorsWriter(draft.dir / "model.safetensors") as writer:
            result = quantize(config, source.tensors(), recipe, writer, device=resolve_device(device), progress=progress)
        progress(Progress("write", result.bytes, result.bytes, 0.0))
        manifest = Manifest(checkpoint=checkpoint, checkpoint_digest=source.digest, recipe=recipe, slug=slug, facts=asdict(result))
        return draft.commit(manifest)


def ensure_variant(store: Store, checkpoint: str, slug: str, *, device: str, progress: Callable[[Progress], None]) -> Variant:
    """The variant, made where it is missing."""
    try:
        return store.variants.get(checkpoint, slug)
    except NotFound:
        return make_variant(store, checkpoint, slug, device=device, progress=progress)
