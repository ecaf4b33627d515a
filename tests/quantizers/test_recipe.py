"""Recipes: slug <-> recipe <-> JSON, and what no recipe may say. All of it without torch."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from quantizers.errors import UnknownRecipe, UnsupportedScheme
from quantizers.methods import METHODS
from quantizers.methods.rtn import Rtn
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import BnbScheme, FloatScheme, IntegerScheme

SLUGS = (
    *("fp32", "bf16", "fp16", "rtn-w8", "rtn-w4", "rtn-w3g64", "rtn-w2g32z", "rtn-w4g64", "rtn-w4g64z", "rtn-w4g32m"),
    *("rtn-w4g128-head8", "rtn-w8a8", "bnb-int8", "bnb-nf4", "bnb-fp4", "bnb-nf4-head8"),
)


@pytest.mark.parametrize("slug", SLUGS)
def test_slug_and_json_name_the_same_recipe(slug: str) -> None:
    recipe = parse_recipe(slug)
    assert recipe.slug == slug
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and [type(method) for method in again.methods] == [METHODS[method.name] for method in recipe.methods]


@pytest.mark.parametrize(
    "slug", ["", "rtn", "w4g64", "rtn-w5", "rtn-w4g48", "gptqq-w4g64", "fp32-head8", "RTN-w4", "rtn-w4g64-head9", "a" * 65]
)
def test_other_slugs_are_unknown(slug: str) -> None:
    with pytest.raises(UnknownRecipe):
        parse_recipe(slug)


@pytest.mark.parametrize("slug", ["rtn-nf4", "rtn-bf16", "rtn-w4g64a8", "rtn-w8g32a8", "bnb-w4g64", "rtn-rtn-w4g64", "rtn-bnb-nf4"])
def test_a_format_that_the_method_cannot_make_is_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme):
        parse_recipe(slug)


def test_json_cannot_say_what_a_slug_cannot() -> None:
    with pytest.raises(UnsupportedScheme):
        Recipe(methods=(Rtn(),), scheme=BnbScheme(format="nf4"))
    with pytest.raises(ValidationError, match="needs a method"):
        Recipe(scheme=IntegerScheme(weight_bits=4, group_size=64))
    with pytest.raises(ValidationError):
        Recipe(scheme=FloatScheme(dtype="bf16"), head=IntegerScheme(weight_bits=8, group_size=32))


@pytest.mark.parametrize("method", [{"name": "nonsense"}, {}, {"name": None}, {"name": ["rtn"]}])
def test_json_with_an_unknown_method_is_refused(method: dict[str, object]) -> None:
    with pytest.raises(UnknownRecipe, match="no method"):
        Recipe.model_validate({"methods": [method], "scheme": {"kind": "integer", "weight_bits": 4}})


@pytest.mark.parametrize("value", [[{"name": "rtn", "bits": 4}], ["rtn"], "rtn", {"name": "rtn"}, [None]])
def test_json_with_malformed_methods_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({"methods": value, "scheme": {"kind": "integer", "weight_bits": 4}})


def test_an_outlier_threshold_belongs_to_int8() -> None:
    assert BnbScheme(format="int8", outlier_threshold=0).outlier_threshold == 0
    with pytest.raises(ValidationError, match="belongs to int8"):
        BnbScheme(format="nf4", outlier_threshold=5)
    for threshold in (-1, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            BnbScheme(format="int8", outlier_threshold=threshold)


def test_recipes_methods_and_reports_import_no_torch() -> None:
    """The HTTP process lists methods, schemas and reports; torch would cost it seconds and hundreds of megabytes."""
    code = (
        "import sys, json, quantizers.recipe, quantizers.report, quantizers.calibration\n"
        "from quantizers.methods import METHODS\n"
        "schemas = [method.model_json_schema() for method in METHODS.values()]\n"
        "print(json.dumps(sorted(name for name in ('torch', 'transformers', 'bitsandbytes') if name in sys.modules)))"
    )
    assert json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) == []
