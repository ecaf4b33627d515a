"""Variants of one checkpoint side by side, from what the store holds: reports, what quantizing said, and what goes by layer. No torch."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from model_store.store import Store
from model_store.variants import Variant
from quantizers.errors import InvalidInput, NotFound
from quantizers.report import Activations, Profile, Report, quantization_of


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layer(_Frozen):
    """One quantized layer: the relative error of its weights, ||w - w'|| / ||w||, and what it takes."""

    name: str
    scheme: str
    relative_error: float
    bytes: int


class Row(_Frozen):
    """One variant. stored_bytes: of its artifact on disk, none for a baseline. after: inputs of layers, where a method changed them."""

    id: str
    report: Report
    kernel_difference: float | None
    stored_bytes: int | None
    layers: tuple[Layer, ...]
    block_errors: tuple[float, ...]
    after: Activations | None

    @property
    def memory_bytes(self) -> int:
        return sum(self.report.bytes.values())

    @property
    def worst_layer(self) -> Layer | None:
        return max(self.layers, key=lambda layer: layer.relative_error, default=None)


class LeftOut(_Frozen):
    id: str
    reason: str


class Comparison(_Frozen):
    """All rows were measured on the same text, in the same windows, on the same kind of device; those that were not are `left_out`.

    before: the checkpoint's own inputs of layers, where a row's measurement has them.
    """

    checkpoint: str
    text: str
    text_sha256: str
    windows: int
    window_tokens: int
    device: str
    variants: tuple[Row, ...]
    before: Activations | None
    left_out: tuple[LeftOut, ...]


def compare(store: Store, models: Sequence[str]) -> Comparison:
    """Compare the variants that `models` name: one checkpoint's name for all that were measured, or ids of its variants.

    Raises InvalidInput for names of several checkpoints, for a variant that was named and has no report, or where two of the named were
    measured on different texts; NotFound for what does not exist, or where nothing was measured.
    """
    checkpoints = list(dict.fromkeys(model.partition("@")[0] for model in models))
    if len(checkpoints) != 1:
        raise InvalidInput(
            f"a comparison is of one checkpoint, against whose own fp32 its variants are measured; "
            f"{', '.join(checkpoints) or 'none'} {'were' if len(checkpoints) else 'was'} named",
            param="model",
        )
    (name,) = checkpoints
    slugs = [slug for model in models for _, at, slug in [model.partition("@")] if at]
    if slugs and len(slugs) < len(models):
        raise InvalidInput(f"name {name} alone for all of its variants, or variants only", param="model")
    chosen = [store.variants.get(name, slug) for slug in dict.fromkeys(slugs)] if slugs else store.variants.list(name)
    rows, left_out = _rows(chosen)
    if slugs and left_out:
        raise InvalidInput(f"{left_out[0].id}: {left_out[0].reason}", param="model")
    if not rows:
        raise NotFound(f"no variant of {name} was measured: run `precis evaluate {name} bf16 rtn-w4g64` or the like", param="model")
    alike, others = _comparable(rows)
    if slugs and others:
        raise InvalidInput(f"{others[0].id}: {others[0].reason}", param="model")
    first = alike[0][0].report
    return Comparison(
        checkpoint=name,
        text=first.text,
        text_sha256=first.text_sha256,
        windows=first.windows,
        window_tokens=first.window_tokens,
        device=first.device,
        variants=tuple(row for row, _ in (alike if slugs else sorted(alike, key=lambda each: -each[0].memory_bytes))),
        before=next((profile.before for _, profile in alike if profile is not None), None),
        left_out=(*left_out, *others),
    )


def _rows(variants: Sequence[Variant]) -> tuple[list[tuple[Row, Profile | None]], list[LeftOut]]:
    rows, left_out = [], []
    for variant in variants:
        if variant.report is None:
            left_out.append(LeftOut(id=variant.id, reason=f"was not measured: run `precis evaluate {variant.checkpoint} {variant.slug}`"))
            continue
        try:
            rows.append(_row(variant, variant.report))
        except (ValidationError, KeyError, TypeError):
            reason = f"its report cannot be read: run `precis evaluate {variant.checkpoint} {variant.slug}` again"
            left_out.append(LeftOut(id=variant.id, reason=reason))
    return rows, left_out


def _row(variant: Variant, stored: dict[str, object]) -> tuple[Row, Profile | None]:
    report = Report.model_validate({"quantization": quantization_of(variant.facts), **stored})
    profile = None if variant.profile is None else Profile.model_validate(variant.profile)
    keys = Layer.model_fields
    row = Row(
        id=variant.id,
        report=report,
        kernel_difference=report.kernel_difference,
        stored_bytes=variant.bytes if variant.files else None,
        layers=tuple(Layer(**{key: layer[key] for key in keys}) for layer in variant.facts.get("layers", ())),
        block_errors=() if profile is None else profile.block_errors,
        after=None if profile is None else profile.after,
    )
    return row, profile


def _comparable(rows: list[tuple[Row, Profile | None]]) -> tuple[list[tuple[Row, Profile | None]], list[LeftOut]]:
    """The largest set of rows that measured the same, and the others."""
    sets: list[list[tuple[Row, Profile | None]]] = []
    for row in rows:
        fitting = next((each for each in sets if each[0][0].report.comparable(row[0].report)), None)
        if fitting is None:
            sets.append([row])
        else:
            fitting.append(row)
    largest = max(sets, key=lambda each: (len(each), each[0][0].report.windows))
    first = largest[0][0].report
    others = [row for each in sets if each is not largest for row, _ in each]
    return largest, [LeftOut(id=row.id, reason=_difference(row.report, first)) for row in others]


def _difference(report: Report, first: Report) -> str:
    mine, theirs = (f"{each.windows} windows of {each.window_tokens} tokens of {each.text}, {each.device}" for each in (report, first))
    return f"was measured on {mine}, the others on {theirs}: evaluate them together"
