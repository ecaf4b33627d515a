"""`precis quantize` and `precis evaluate`: the work that needs no server, in this process, with progress. Imports torch."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from model_store.checkpoints import Checkpoint
from model_store.store import Store
from model_store.variants import Manifest
from quantizers.calibration import Text, evaluation_text, token_windows
from quantizers.errors import InvalidInput, NotFound
from quantizers.evaluate import WINDOW_TOKENS
from quantizers.evaluate import evaluate as measure
from quantizers.model import LoadedModel, load_model, load_reference
from quantizers.pipeline import Progress
from quantizers.recipe import parse_recipe
from quantizers.report import Report, quantization_of
from quantizers.shared import SharedTensors
from server.calibration import DEFAULT, SELF, CalibrationOptions, TextFile, find_file, read_text
from server.console import Share, bar, output
from server.engine.interface import KvDtype
from server.execution import ServedExecution
from server.plot import check_picture, plot_quality
from server.quantizing import ensure_variant, make_variant, resolve_device
from server.settings import Settings
from server.sources import open_checkpoint
from server.text.tokenizer import Tokenizer

Load = Callable[..., LoadedModel]  # `load_model` or `load_reference`


def quantize(settings: Settings, model: str, slugs: Sequence[str], calibration: CalibrationOptions | None = None) -> None:
    """Make variants; one that exists is left as it is. All recipes are checked before the first runs.

    `calibration` is for recipes that look at tokens, and at least one of them must; None takes the default text and sizes.
    """
    needing = [slug for slug in slugs if parse_recipe(slug).needs_calibration]
    if calibration is not None and not needing:
        raise InvalidInput(f"{', '.join(slugs)}: no method here looks at calibration tokens; leave the options out", param="calibration")
    for slug in slugs:
        if parse_recipe(slug).is_baseline:
            raise InvalidInput(f"{slug} is a baseline: it is served from the checkpoint as it is", param="recipes")
    console = Console(stderr=True)
    with Store(settings.data_dir) as store:
        if calibration is not None and calibration.source not in (DEFAULT, SELF):
            read_text(find_file(calibration.source, store.files), "calibration")  # before anything is imported
        checkpoint = _open(store, model)
        for slug in dict.fromkeys(slugs):
            try:
                variant = store.variants.get(checkpoint.name, slug)
                console.print(f"{variant.id} exists: {variant.bytes / 1e6:.1f} MB", highlight=False)
            except NotFound:
                with bar(f"{checkpoint.name}@{slug}") as share:
                    shown = calibration if slug in needing else None
                    variant = make_variant(store, checkpoint.name, slug, device=settings.device, progress=shares(share), calibration=shown)
                console.print(f"{variant.id}: {variant.bytes / 1e6:.1f} MB in {variant.facts['seconds']:.1f} s", highlight=False)


def evaluate(
    settings: Settings, model: str, slugs: Sequence[str], *, text_file: Path | None, windows: int, as_json: bool, plot: Path | None
) -> None:
    """Measure recipes against the checkpoint's fp32, keep the reports with the variants, print a table or JSON, and draw the plot."""
    text = evaluation_text() if text_file is None else read_text(TextFile(text_file, text_file.name), "text")
    for slug in slugs:
        parse_recipe(slug)
    if plot is not None:
        check_picture(plot)
    with Store(settings.data_dir) as store:
        checkpoint = _open(store, model)
        tokens = token_windows(Tokenizer(checkpoint.dir).encode_now, text, length=WINDOW_TOKENS, count=windows)
        reports = _measure(store, checkpoint, list(dict.fromkeys(slugs)), tokens, text, settings.device, settings.kv_dtype)
    if as_json:
        print(json.dumps([report.model_dump() for report in reports.values()], indent=2))
    else:
        output().print(_table(checkpoint.name, reports))
    if plot is not None:
        plot_quality(checkpoint.name, list(reports.values()), plot)


def _open(store: Store, model: str) -> Checkpoint:
    with bar(f"importing {model}") as share:
        return open_checkpoint(store, model, share)


def _measure(
    store: Store, checkpoint: Checkpoint, slugs: list[str], windows: torch.Tensor, text: Text, device: str, kv_dtype: KvDtype
) -> dict[str, Report]:
    """Reports by slug, stored with the variants."""
    target = resolve_device(device)
    for slug in slugs:
        if not parse_recipe(slug).is_baseline:
            with bar(f"{checkpoint.name}@{slug}") as share:
                ensure_variant(store, checkpoint.name, slug, device=device, progress=shares(share))
    shared = SharedTensors()
    config = AutoConfig.from_pretrained(checkpoint.dir, local_files_only=True)
    with ExitStack() as stack, bar("evaluating") as share:

        def load(slug: str, how: Load = load_model) -> LoadedModel:
            recipe = parse_recipe(slug)
            artifact = None if recipe.is_baseline else store.variants.get(checkpoint.name, slug).tensors()
            loaded = how(config, recipe, checkpoint.tensors(), artifact, device=target, shared=shared, checkpoint_key=checkpoint.digest)
            stack.callback(loaded.close)
            return loaded

        reference = load("fp32").model
        variants = {slug: load(slug) for slug in slugs}
        exact = {slug: load(slug, load_reference) for slug in slugs if not parse_recipe(slug).is_baseline}
        executions = {slug: ServedExecution(loaded, config, kv_dtype) for slug, loaded in variants.items()}
        for execution in executions.values():
            stack.callback(execution.close)
        reports = measure(reference, variants, windows, text, executions=executions, exact=exact, progress=shares(share))
    for slug, report in reports.items():
        report = report.model_copy(update={"kv_dtype": executions[slug].kv_dtype})
        reports[slug] = _keep(store, checkpoint, slug, report)
    return reports


def _keep(store: Store, checkpoint: Checkpoint, slug: str, report: Report) -> Report:
    """The report with what making the variant cost, as it is stored. A baseline has no artifact, but its report needs a place: a variant
    of a manifest alone.
    """
    recipe = parse_recipe(slug)
    if recipe.is_baseline and not store.variants.has(checkpoint.name, slug):
        with store.variants.create(checkpoint.name, slug) as draft:
            draft.commit(Manifest(checkpoint=checkpoint.name, checkpoint_digest=checkpoint.digest, recipe=recipe, slug=slug))
    report = report.model_copy(update={"quantization": quantization_of(store.variants.get(checkpoint.name, slug).facts)})
    profile = None if report.profile is None else report.profile.model_dump()
    store.variants.set_report(checkpoint.name, slug, report.model_dump(exclude={"profile"}), profile)
    return report


def _table(name: str, reports: dict[str, Report]) -> Table:
    first = next(iter(reports.values()))
    title = f"{name} on {first.text}, {first.windows} windows of {first.window_tokens} tokens, {first.device}"
    table = Table("recipe", title=title, title_justify="left")
    for column in (
        "perplexity",
        "KL to fp32",
        "in fp32 arithmetic",
        "KL p99",
        "top-1",
        "MB",
        "of them shared",
        "tokens/s",
        "KV",
        "kernels",
    ):
        table.add_column(column, justify="left" if column == "kernels" else "right")
    for slug, report in reports.items():
        table.add_row(
            slug,
            f"{report.perplexity:.3f}",
            f"{report.kl_divergence:.5f}",
            "" if report.reference_kl_divergence is None else f"{report.reference_kl_divergence:.5f}",
            f"{report.kl_divergence_p99:.4f}",
            f"{report.top1_agreement:.1%}",
            f"{sum(report.bytes.values()) / 1e6:.1f}",
            f"{report.bytes.get('shared_weights', 0) / 1e6:.1f}",
            f"{report.decode_tokens_per_second:.1f}",
            report.kv_dtype or "",
            ", ".join(f"{kernel} x{count}" for kernel, count in sorted(report.kernels.items())),
        )
    return table


def shares(share: Share) -> Callable[[Progress], None]:
    """Moves a bar with a quantization's progress."""

    def show(progress: Progress) -> None:
        loss = "" if progress.loss is None else f", loss {progress.loss:.4g}"
        share(progress.stage, progress.done / progress.total if progress.total else 0.0, loss)

    return show
