"""Recipes: slug <-> recipe <-> JSON, and what no recipe may say. All of it without torch."""

import json
import re
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
    *("bnb-int8t0", "bnb-int8t3.5", "bnb-nf4dq", "bnb-fp4dq-head8", "bnb-nf4-downproj.int8t3.5"),
    *("rtn-fp8", "rtn-mxfp4-head8", "rtn-nvfp4", "rtn-mxfp4-downproj.fp8"),
    *("rtn-w4g64-embed8", "gptq-w4g64z-head8-embed8", "rtn-mxfp4-layers.0.bf16-embed8"),
    *("rtn-w4g64a8", "gptq-w4g64za8", "smoothquant-w8g32a8", "rtn-w3ma8"),
    *("gptq.damping0.05.actorderoff.targetquantized-w4g64", "smoothquant.alphaauto-gptq.damping0.00001-w8a8", "awq.grid40.clipoff-w4g64z"),
    *("rtn-mix3.5g64z", "gptq-mix4g128-head8", "rtn-w3g64z-downproj.w4g64-layers.0.bf16-head8", "gptq-mix3.25g64-layers.29.mlp.w8g64"),
)


@pytest.mark.parametrize("slug", SLUGS)
def test_slug_and_json_name_the_same_recipe(slug: str) -> None:
    recipe = parse_recipe(slug)
    assert recipe.slug == slug
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and [type(method) for method in again.methods] == [METHODS[method.name] for method in recipe.methods]


@pytest.mark.parametrize(
    "slug",
    [
        "",
        "rtn",
        "w4g64",
        "rtn-w5",
        "rtn-w4g48",
        "gptqq-w4g64",
        "fp32-head8",
        "fp32-embed8",
        "rtn-w4g64-embed4",
        "RTN-w4",
        "rtn-w4g64-head9",
        "a" * 97,
    ],
)
def test_other_slugs_are_unknown(slug: str) -> None:
    with pytest.raises(UnknownRecipe):
        parse_recipe(slug)


@pytest.mark.parametrize(
    "slug",
    [
        "rtn-nf4",
        "gptq-mxfp4",
        "bnb-fp8",
        "rtn-bf16",
        "awq-w4g64a8",
        "smoothquant-w4g64",
        "bnb-w4g64a8",
        "bnb-w4g64",
        "rtn-rtn-w4g64",
        "rtn-bnb-nf4",
    ],
)
def test_a_format_that_the_method_cannot_make_is_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme):
        parse_recipe(slug)


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("gptq.damping0.10-w4g64", "is written 'gptq.damping0.1-w4g64'"),
        ("gptq.damping0.01-w4g64", "is written 'gptq-w4g64'"),
        ("gptq.actorderoff.damping0.1-w4g64", "is written 'gptq.damping0.1.actorderoff-w4g64'"),
        ("gptq.damping7-w4g64", "damping: Input should be less than or equal to 1"),
        ("gptq.damping-w4g64", "no option 'damping'"),
        ("gptq.dampingnan-w4g64", "damping"),
        ("gptq.speed9-w4g64", "no option 'speed9': it has actorder, blocksize, damping, target"),
        ("gptq.targetnothing-w4g64", "target"),
        ("rtn-w4g64-embed8-head8", "'embed8' is no override"),
        ("bnb-int8t6", "is written 'bnb-int8'"),
        ("bnb-int8t3.50", "is written 'bnb-int8t3.5'"),
        ("bnb-int8t99999", "an outlier threshold is at most 10000"),
        ("bnb-int8t", "'int8t' is no method"),
        ("bnb-int8dq", "'int8dq' is no method"),
        ("bnb-nf4t3", "'nf4t3' is no method"),
        ("rtn-mix2.2g64", "cannot be spent: w2g64 takes 2.25, w8g64 8.25"),
        ("rtn-mix3.5", "'mix3.5' is not a number format"),
        ("rtn-mix3.5g48", "'mix3.5g48' is not a number format"),
        ("rtn-w4g64-w8g64", "'w8g64' is no override"),
        ("rtn-w4g64-mlp.mix3.5g64", "is no override"),
        ("rtn-w4g64-mlp.fp32", "is no override"),
        ("rtn-w4g64-down.", "is no override"),
        ("rtn-w4g64-.w8g64", "is no override"),
        ("gqtp-w4g64", "'gqtp' is no method"),
        ("smoothquant-gqtp-w8a8", "'gqtp' is no method"),
        ("gptq", "names no number format"),
    ],
)
def test_what_is_wrong_with_a_slug_is_said(slug: str, message: str) -> None:
    with pytest.raises(UnknownRecipe, match=re.escape(message)):
        parse_recipe(slug)


def test_an_override_is_for_layers_with_its_names_in_a_row_and_the_last_one_counts() -> None:
    recipe = parse_recipe("rtn-w4g64-mlp.w8g64-layers.1.bf16-layers.1.mlp.downproj.w2g64")
    formats = {
        name: recipe.scheme_of(f"model.layers.{name}").slug
        for name in (
            "0.mlp.up_proj",
            "0.self_attn.q_proj",
            "1.self_attn.q_proj",
            "1.mlp.down_proj",
            "10.mlp.up_proj",
            "11.self_attn.o_proj",
        )
    }
    assert formats == {
        "0.mlp.up_proj": "w8g64",
        "0.self_attn.q_proj": "w4g64",
        "1.self_attn.q_proj": "bf16",
        "1.mlp.down_proj": "w2g64",
        "10.mlp.up_proj": "w8g64",
        "11.self_attn.o_proj": "w4g64",
    }


def test_an_override_that_its_method_cannot_make_is_refused() -> None:
    with pytest.raises(UnsupportedScheme, match="nf4"):
        parse_recipe("gptq-w4g64-downproj.nf4")


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
