"""One run of a recipe over a stored checkpoint: the quantizers' walk between the store's reader and its writer. Imports torch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from model_store.checkpoints import Checkpoint
from model_store.formats.safetensors import SafetensorsSource, SafetensorsWriter
from model_store.store import Store
from model_store.variants import Manifest, Variant
from quantizers.calibration import SAMPLE_TOKENS, SAMPLES, Calibration, Text, calibrate_on, calibration_text
from quantizers.canary import TEXT, TOKENS, Canary, record
from quantizers.errors import InvalidInput, NotFound
from quantizers.evaluate import model_logits
from quantizers.model import load_reference
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.shared import SharedTensors
from quantizers.skeleton import DTYPES
from server.text.tokenizer import Tokenizer

__all__ = ["CalibrationSettings", "Progress", "ensure_variant", "make_variant", "read_text", "resolve_device"]


def resolve_device(device: str) -> str:
    """`auto` is the first GPU if there is one. Raises InvalidInput for a GPU that is not there."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch {torch.__version__} sees no GPU here; use cpu or auto", param="device")
    return device


@dataclass(frozen=True)
class CalibrationSettings:
    """Which tokens methods are shown: a UTF-8 text file, the default text where it is None; `samples` windows of `length` tokens.

    Without a seed they are the text's first, with one they are drawn from all of its windows.
    """

    text: Path | None = None
    samples: int = SAMPLES
    length: int = SAMPLE_TOKENS
    seed: int | None = None


def make_variant(
    store: Store,
    checkpoint: str,
    slug: str,
    *,
    device: str,
    progress: Callable[[Progress], None],
    calibration: CalibrationSettings | None = None,
) -> Variant:
    """Quantize and commit. Raises Conflict where the variant exists, QuantizationFailed naming the layer, InvalidInput for a baseline, a
    calibration text that is too short, or calibration settings for a recipe whose methods look at no tokens.
    """
    recipe = parse_recipe(slug)
    source = store.checkpoints.get(checkpoint)
    tokens = _calibrate(recipe, source, calibration)
    config = AutoConfig.from_pretrained(source.dir, local_files_only=True)
    with store.variants.create(checkpoint, slug) as draft:
        with SafetensorsWriter(draft.dir / "model.safetensors") as writer:
            result = quantize(
                config, source.tensors(), recipe, writer, calibration=tokens, device=resolve_device(device), progress=progress
            )
        progress(Progress("write", result.bytes, result.bytes, 0.0))
        manifest = Manifest(
            checkpoint=checkpoint,
            checkpoint_digest=source.digest,
            recipe=recipe,
            slug=slug,
            facts=asdict(result),
            canary=_canary(source, recipe, draft.dir / "model.safetensors", resolve_device(device)).model_dump(),
        )
        return draft.commit(manifest)


def _canary(checkpoint: Checkpoint, recipe: Recipe, artifact: Path, device: str) -> Canary:
    """What the written artifact gives the canary's text, one pass over a few tokens in each of two types."""
    config = AutoConfig.from_pretrained(checkpoint.dir, local_files_only=True)
    length = min(TOKENS, checkpoint.max_position_embeddings or TOKENS)
    tokens = Tokenizer(checkpoint.dir).encode_now(TEXT)[:length]

    def logits(dtype: torch.dtype) -> torch.Tensor:
        loaded = load_reference(
            config,
            recipe,
            checkpoint.tensors(),
            SafetensorsSource([artifact]),
            device=device,
            shared=SharedTensors(),
            checkpoint_key=checkpoint.digest,
            dtype=dtype,
        )
        try:
            return model_logits(loaded.model, torch.tensor(tokens))
        finally:
            loaded.close()

    return record(tokens, logits(torch.float32), logits(DTYPES[recipe.dtype]))


def _calibrate(recipe: Recipe, checkpoint: Checkpoint, settings: CalibrationSettings | None) -> Calibration | None:
    if not recipe.needs_calibration:
        if settings is not None:
            raise InvalidInput(f"{recipe.slug} looks at no calibration tokens: leave the calibration options out", param="calibration")
        return None
    settings = settings or CalibrationSettings()
    text = calibration_text() if settings.text is None else read_text(settings.text)
    encode = Tokenizer(checkpoint.dir).encode_now
    return calibrate_on(encode, text, samples=settings.samples, length=settings.length, seed=settings.seed)


def read_text(file: Path) -> Text:
    """A UTF-8 text file by its name. Raises InvalidInput."""
    try:
        return Text(file.name, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{str(file)!r} is no readable UTF-8 text: {error}", param="text") from error


def ensure_variant(store: Store, checkpoint: str, slug: str, *, device: str, progress: Callable[[Progress], None]) -> Variant:
    """The variant, made where it is missing."""
    try:
        return store.variants.get(checkpoint, slug)
    except NotFound:
        return make_variant(store, checkpoint, slug, device=device, progress=progress)
