"""Recipes: which methods, in which order, to which number formats; and the slug that names one. Plain data, no torch.

Grammar of a slug (`[a-z0-9.-]`). It says everything, so that a recipe can be asked for by name alone:

    recipe   = baseline | method ("-" method)* "-" format ("-" override)* ["-head8"] ["-embed8"]
    baseline = "fp32" | "bf16" | "fp16"
    method   = name ("." option)*           e.g. gptq, gptq.damping0.1.actorderoff: a field's name without underscores, then its value
    format   = what `quantizers.scheme.parse_scheme` reads, e.g. w4g64z, w8a8, nf4, mix3.5g64z
    override = path "." format              e.g. downproj.w8g64, layers.0.bf16: for layers whose name has these components in a row

Names of modules are written without their underscores; where several overrides fit a layer, the last one counts.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, field_validator, model_validator

from quantizers.errors import UnknownRecipe, UnsupportedScheme
from quantizers.methods import METHODS, Method
from quantizers.scheme import EMBED8, HEAD8, FloatScheme, IntegerScheme, MixedScheme, Scheme, parse_scheme

MAX_SLUG = 96
_SLUG = re.compile(rf"[a-z0-9.-]{{1,{MAX_SLUG}}}")
_PATH = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
BASELINES = ("fp32", "bf16", "fp16")


class Override(BaseModel):
    """Another format for some layers. `scheme` is a float one where they are left alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    scheme: Scheme

    @model_validator(mode="after")
    def _fits_a_layer(self) -> "Override":
        if not _PATH.fullmatch(self.path):
            raise ValueError(f"{self.path[:80]!r} is no path of module names: use a-z, 0-9 and dots, such as mlp.downproj")
        if isinstance(self.scheme, MixedScheme) or (isinstance(self.scheme, FloatScheme) and self.scheme.dtype != "bf16"):
            raise ValueError(f"{self.path}: a layer has a quantized format of its own, or bf16 where it is left alone")
        return self

    @property
    def slug(self) -> str:
        return f"{self.path}.{self.scheme.slug}"

    def fits(self, name: str) -> bool:
        """Whether the layer with the full `name`, such as `model.layers.0.mlp.down_proj`, is one of those that this is for."""
        return f".{self.path}." in f".{name.replace('_', '').lower()}."


class Recipe(BaseModel):
    """`methods` is empty for a baseline. `dtype` is the floating type of everything that is not quantized and of the activations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[SerializeAsAny[Method], ...] = ()
    scheme: Scheme
    overrides: tuple[Override, ...] = ()
    head: IntegerScheme | None = None
    embedding: IntegerScheme | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_by_name(cls, value: Any) -> Any:
        """JSON names a method by its `name`; its options are checked by the class that the name is registered for."""
        return tuple(_method(item) for item in value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _methods_fit_scheme(self) -> "Recipe":
        beyond = self.head is not None or self.embedding is not None or self.overrides
        if not self.methods and (not isinstance(self.scheme, FloatScheme) or beyond):
            raise ValueError(f"the format {self.scheme.slug} needs a method, such as rtn-{self.scheme.slug}")
        for method in self.methods[:-1]:
            if method.role == "quantizer":
                raise UnsupportedScheme(
                    f"{method.name} chooses the numbers itself, so it can only be the last method of a recipe", param="model"
                )
        if self.methods:
            if self.methods[-1].role == "transform":
                raise UnsupportedScheme(
                    f"{self.methods[-1].name} only prepares weights: name a quantizer after it, such as rtn", param="model"
                )
            for method in self.methods:
                for scheme in self._schemes():
                    method.check(scheme)
        return self

    def _schemes(self) -> list[Any]:
        """All formats that the methods may have to make."""
        own = self.scheme.choices if isinstance(self.scheme, MixedScheme) else (self.scheme,)
        return [*own, *(override.scheme for override in self.overrides if not isinstance(override.scheme, FloatScheme))]

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        return self.scheme.dtype if isinstance(self.scheme, FloatScheme) else "bf16"

    @property
    def is_baseline(self) -> bool:
        return not self.methods

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing looks at tokens: where a method does, or widths are given by what they gain."""
        return any(method.needs_calibration for method in self.methods) or isinstance(self.scheme, MixedScheme)

    @property
    def has_finish(self) -> bool:
        """Whether the last method works on the whole model when all blocks are quantized."""
        return bool(self.methods) and self.methods[-1].has_finish()

    @property
    def slug(self) -> str:
        parts = [*map(_method_slug, self.methods), self.scheme.slug, *(override.slug for override in self.overrides)]
        return "-".join(parts + (["head8"] if self.head else []) + (["embed8"] if self.embedding else []))

    def scheme_of(self, name: str) -> Scheme:
        """The format of the decoder layer with this full name."""
        return next((override.scheme for override in reversed(self.overrides) if override.fits(name)), self.scheme)


def _method(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise UnknownRecipe(f"{str(name)[:80]!r} is no method; methods: {', '.join(sorted(METHODS))}", param="methods")
    return METHODS[name].model_validate(value)


@lru_cache(maxsize=1024)  # a stranger can name any number of them
def parse_recipe(slug: str) -> Recipe:
    """The recipe that `slug` names. Raises UnknownRecipe or UnsupportedScheme."""
    if not _SLUG.fullmatch(slug):
        raise UnknownRecipe(
            f"{slug[:80]!r} is not a recipe: a recipe has 1 to {MAX_SLUG} of the characters a-z, 0-9, '.' and '-'", param="model"
        )
    if slug in BASELINES:
        return Recipe(scheme=FloatScheme(dtype=slug))
    words, embedding = (slug.removesuffix("-embed8"), EMBED8) if slug.endswith("-embed8") else (slug, None)
    words, head = (words.removesuffix("-head8"), HEAD8) if words.endswith("-head8") else (words, None)
    parts, count = _method_words(words.split("-"))
    if count in (0, len(parts)):
        raise UnknownRecipe(
            f"{slug!r} is not a recipe: {parts[0]!r} is no method. A recipe is {', '.join(BASELINES)} or <method>-<format>, "
            f"such as rtn-w4g64; methods: {', '.join(sorted(METHODS))}"
            if count == 0
            else f"{slug!r} is not a recipe: it names no number format, such as {slug}-w4g64",
            param="model",
        )
    methods = tuple(_parse_method(part) for part in parts[:count])
    scheme = _parse_format(parts[count], slug)
    overrides = tuple(_parse_override(part) for part in parts[count + 1 :])
    recipe = Recipe(methods=methods, scheme=scheme, overrides=overrides, head=head, embedding=embedding)
    if recipe.slug != slug:
        raise UnknownRecipe(
            f"{slug!r} is written {recipe.slug!r}: options in their order, without those that are the default", param="model"
        )
    return recipe


def _method_words(parts: list[str]) -> tuple[list[str], int]:
    """The words of a slug, a method's name with a hyphen in one, and how many of the first name methods."""
    words: list[str] = []
    while parts:
        size = next((size for size in (1, 2) if "-".join(parts[:size]).partition(".")[0] in METHODS), 0)
        if not size:
            break
        words.append("-".join(parts[:size]))
        parts = parts[size:]
    return [*words, *parts], len(words)


def _parse_format(text: str, slug: str) -> Scheme:
    """A word that is neither a method nor a format is more likely a misspelt method."""
    try:
        return parse_scheme(text)
    except UnknownRecipe as error:
        message = f"{slug!r} is not a recipe: {text!r} is no method ({', '.join(sorted(METHODS))}); and {error.message}"
        raise UnknownRecipe(message, param="model") from error


def _parse_override(text: str) -> Override:
    for match in re.finditer(r"\.", text):  # a format may have a dot of its own, as in int8t3.5
        path, format_ = text[: match.start()], text[match.end() :]
        try:
            return Override(path=path, scheme=parse_scheme(format_))
        except (UnknownRecipe, ValidationError):
            continue
    raise UnknownRecipe(
        f"{text!r} is no override: write a layer's name or a part of it without underscores, a dot, and a format or bf16, "
        "such as downproj.w8g64 or layers.0.bf16",
        param="model",
    )


def _parse_method(text: str) -> Method:
    name, *options = re.split(r"\.(?=[a-z])", text)
    method = METHODS[name]
    fields = {field.replace("_", ""): field for field in method.model_fields if field != "name"}
    values: dict[str, str] = {}
    for option in options:
        squashed = max((each for each in fields if option.startswith(each) and option != each), key=len, default=None)
        if squashed is None:
            raise UnknownRecipe(f"{name} has no option {option!r}: it has {', '.join(sorted(fields)) or 'none'}", param="model")
        values[fields[squashed]] = option.removeprefix(squashed)
    try:
        return method.model_validate({"name": name, **values})
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise UnknownRecipe(f"{name}, option {first['loc'][0] if first['loc'] else ''}: {message}", param="model") from error


def _method_slug(method: Method) -> str:
    defaults: Mapping[str, Any] = type(method)(name=method.name).model_dump()
    changed = {field: value for field, value in method.model_dump().items() if value != defaults[field]}
    return ".".join([method.name, *(f"{field.replace('_', '')}{_option_slug(value)}" for field, value in changed.items())])


def _option_slug(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{Decimal(repr(value)).normalize():f}" if isinstance(value, int | float) else value
