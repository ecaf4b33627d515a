"""One run of a recipe over a stored checkpoint: the quantizers' walk between the store's reader and its writer. Imports torch."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from model_store.checkpoints import Checkpoint
from model_store.formats.safetensors import SafetensorsSource, SafetensorsWriter
from model_store.store import Store
from model_store.variants import Manifest, Variant
from quantizers.calibration import Calibration, calibrate_on, calibrate_on_documents, calibration_text
from quantizers.canary import TEXT, TOKENS, Canary, record
from quantizers.errors import InvalidInput, NotFound
from quantizers.evaluate import model_logits
from quantizers.generated import generate_calibration
from quantizers.memory import trim_heap
from quantizers.model import load_model, load_reference
from quantizers.pipeline import Progress, check_length, quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.shared import SharedTensors
from quantizers.skeleton import DTYPES
from server.calibration import DEFAULT, SELF, CalibrationOptions, find_file, read_documents, read_text
from server.engine.device import measure
from server.text.tokenizer import Tokenizer

__all__ = ["Progress", "ensure_variant", "make_variant", "resolve_device"]


def resolve_device(device: str) -> str:
    """`auto` is the first GPU if there is one. Raises InvalidInput for a GPU that is not there."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch {torch.__version__} sees no GPU here; use cpu or auto", param="device")
    return device


def make_variant(
    store: Store,
    checkpoint: str,
    slug: str,
    *,
    device: str,
    progress: Callable[[Progress], None],
    calibration: CalibrationOptions | None = None,
) -> Variant:
    """Quantize and commit. A method that trains goes on from where an earlier try of this variant was killed.

    Raises Conflict where the variant exists, QuantizationFailed naming the layer, InvalidInput for a baseline, a
    calibration text that is too short, or calibration options for a recipe whose methods look at no tokens.
    """
    recipe, target = parse_recipe(slug), resolve_device(device)
    source = store.checkpoints.get(checkpoint)
    config = AutoConfig.from_pretrained(source.dir, local_files_only=True)
    tokens = _calibrate(recipe, source, config, calibration, store, target, progress)
    with store.variants.create(checkpoint, slug) as draft:
        with SafetensorsWriter(draft.dir / "model.safetensors") as writer:
            result = quantize(
                config,
                source.tensors(),
                recipe,
                writer,
                calibration=tokens,
                device=target,
                progress=progress,
                checkpoints=store.training(checkpoint, slug),
                memory_limit=measure(torch.device(target)).free,
            )
        progress(Progress("write", result.bytes, result.bytes, 0.0))
        manifest = Manifest(
            checkpoint=checkpoint,
            checkpoint_digest=source.digest,
            recipe=recipe,
            slug=slug,
            facts=asdict(result),
            canary=_canary(source, config, recipe, draft.dir / "model.safetensors", target).model_dump(),
        )
        variant = draft.commit(manifest)
    store.forget_training(checkpoint, slug)
    return variant


def _canary(checkpoint: Checkpoint, config: PretrainedConfig, recipe: Recipe, artifact: Path, device: str) -> Canary:
    """What the written artifact gives the canary's text, one pass over a few tokens in each of two types."""
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


def _calibrate(
    recipe: Recipe,
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    options: CalibrationOptions | None,
    store: Store,
    device: str,
    progress: Callable[[Progress], None],
) -> Calibration | None:
    if not recipe.needs_calibration:
        if options is not None:
            raise InvalidInput(f"{recipe.slug} looks at no calibration tokens: leave the calibration options out", param="calibration")
        return None
    options = options or CalibrationOptions()
    check_length(config, options.length)
    tokenizer = Tokenizer(checkpoint.dir)
    cut = partial(calibrate_on, tokenizer.encode_now, samples=options.samples, length=options.length, seed=options.seed)
    if options.source == SELF:
        return _by_itself(checkpoint, config, tokenizer, options, device, progress)
    if options.source == DEFAULT:
        return cut(calibration_text())
    file = find_file(options.source, store.files)
    if file.is_jsonl:
        documents, sha256 = read_documents(file, tokenizer)
        return calibrate_on_documents(documents, file.name, sha256, samples=options.samples, length=options.length, seed=options.seed)
    return cut(read_text(file, "calibration"))


def _by_itself(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    tokenizer: Tokenizer,
    options: CalibrationOptions,
    device: str,
    progress: Callable[[Progress], None],
) -> Calibration:
    """The whole model is in memory meanwhile: as views of its files where it is stored in fp32 and runs on the CPU, in bf16 otherwise."""
    source = checkpoint.tensors()
    is_fp32 = all(source.dtype(name) == torch.float32 for name in source.keys())  # noqa: SIM118  a source of tensors is no mapping
    baseline = parse_recipe("fp32" if is_fp32 and device == "cpu" else "bf16")
    started = time.monotonic()

    def report(done: int, total: int) -> None:
        progress(Progress("generate", done, total, (time.monotonic() - started) / done * (total - done)))

    loaded = load_model(config, baseline, source, None, device=device, shared=SharedTensors(), checkpoint_key=checkpoint.digest)
    try:
        allowed = torch.arange(config.get_text_config(decoder=True).vocab_size, device=device) < tokenizer.size
        allowed[[index for index in tokenizer.special_ids if index < len(allowed)]] = False
        return generate_calibration(
            loaded.model, allowed, samples=options.samples, length=options.length, seed=options.seed or 0, progress=report
        )
    finally:
        loaded.close()
        trim_heap()


def ensure_variant(store: Store, checkpoint: str, slug: str, *, device: str, progress: Callable[[Progress], None]) -> Variant:
    """The variant, made where it is missing."""
    try:
        return store.variants.get(checkpoint, slug)
    except NotFound:
        return make_variant(store, checkpoint, slug, device=device, progress=progress)
