"""Recipes: which methods, in which order, to which number format; and the slug that names one. Plain data, no torch.

Grammar of a slug (`[a-z0-9.-]`):

    recipe   = baseline | methods "-" format ["-head8"]
    baseline = "fp32" | "bf16" | "fp16"
    methods  = method ("-" method)*            e.g. smoothquant-gptq
    format   = what `quantizers.scheme.parse_scheme` reads, e.g. w4g64z, w8a8, nf4
"""

import re
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializeAsAny, field_validator, model_validator

from quantizers.errors import UnknownRecipe, UnsupportedScheme
from quantizers.methods import METHODS, Method
from quantizers.scheme import HEAD8, FloatScheme, IntegerScheme, Scheme, parse_scheme

_SLUG = re.compile(r"[a-z0-9.-]{1,64}")
BASELINES = ("fp32", "bf16", "fp16")


class Recipe(BaseModel):
    """`methods` is empty for a baseline. `dtype` is the floating type of everything that is not quantized and of the activations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[SerializeAsAny[Method], ...] = ()
    scheme: Scheme
    head: IntegerScheme | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_by_name(cls, value: Any) -> Any:
        """JSON names a method by its `name`; its options are checked by the class that the name is registered for."""
        return tuple(_method(item) for item in value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _methods_fit_scheme(self) -> "Recipe":
        if not self.methods and (not isinstance(self.scheme, FloatScheme) or self.head is not None):
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
                method.check(self.scheme)
        return self

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        return self.scheme.dtype if isinstance(self.scheme, FloatScheme) else "bf16"

    @property
    def is_baseline(self) -> bool:
        return not self.methods

    @property
    def slug(self) -> str:
        parts = [method.name for method in self.methods] + [self.scheme.slug]
        return "-".join(parts + (["head8"] if self.head else []))


def _method(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise UnknownRecipe(f"{str(name)[:80]!r} is no method; methods: {', '.join(sorted(METHODS))}", param="methods")
    return METHODS[name].model_validate(value)


@cache
def parse_recipe(slug: str) -> Recipe:
    """The recipe, with default options, that `slug` names. Raises UnknownRecipe or UnsupportedScheme."""
    if not _SLUG.fullmatch(slug):
        raise UnknownRecipe(f"{slug[:80]!r} is not a recipe: a recipe has 1 to 64 of the characters a-z, 0-9, '.' and '-'", param="model")
    if slug in BASELINES:
        return Recipe(scheme=FloatScheme(dtype=slug))
    words, head = (slug.removesuffix("-head8"), HEAD8) if slug.endswith("-head8") else (slug, None)
    *names, format_ = words.split("-")
    if not names or any(name not in METHODS for name in names):
        unknown = next((name for name in names if name not in METHODS), words)
        raise UnknownRecipe(
            f"{slug!r} is not a recipe: {unknown!r} is no method. A recipe is {', '.join(BASELINES)} or <method>-<format>, "
            f"such as rtn-w4g64; methods: {', '.join(sorted(METHODS))}",
            param="model",
        )
    scheme = parse_scheme(format_)
    methods = tuple(METHODS[name](name=name) for name in names)
    return Recipe(methods=methods, scheme=scheme, head=head)
