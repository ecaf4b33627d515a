"""Schemas that can be followed, and the path of what is wrong in those that cannot."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.errors import InvalidInput
from server.text.grammar import MAX_SCHEMA, schema_grammar


def grammar_of(schema: Any) -> str:
    return asyncio.run(schema_grammar(schema, "S"))


@pytest.mark.parametrize(
    ("schema", "path", "word"),
    [
        ({"type": "objekt"}, "S", "objekt"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "S.properties.a", "not"),
        ({"$defs": {"x": {"uniqueItems": True}}, "properties": {"a": {"$ref": "#/$defs/x"}}}, "S.$defs.x", "uniqueItems"),
        ({"items": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(?=a)"}]}}, "S.items.anyOf.1", "look-around"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "S", "minLength"),
        ({"properties": {"b": {"$ref": "#/$defs/no"}}}, "S.properties.b", "does not exist"),
        ({"properties": {"b": {"$ref": "https://example.org/schema"}}}, "S.properties.b", "example.org"),
        ({"properties": {"a": 3}}, "S", "schema"),
        ({"enum": []}, "S", "empty"),
        ({"x-guidance": {"lenient": True}}, "S.x-guidance", "keyword"),
        ({"type": "string", "format": "no-such-format"}, "S", "no-such-format"),
        ({"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {}}}]}, "S", "oneOf"),
        ({"description": "x" * MAX_SCHEMA}, "S", "characters"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(schema: dict[str, Any], path: str, word: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        grammar_of(schema)
    assert caught.value.param == path and word in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "array", "items": {"$ref": "#"}},
        {"enum": ["a", 1, None, True]},
        {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number", "exclusiveMinimum": 0}]},
        {"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"},
    ],
)
def test_what_can_be_followed(schema: dict[str, Any]) -> None:
    assert json.loads(grammar_of(schema))["grammars"]


KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "anyOf", "enum", "$ref", "pattern", "minLength", "required", "format", "const", "$defs"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["string", "object", "array", "#", "#/$defs/a", "(", "a*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS | st.just("a"), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYWORDS, VALUES, max_size=4))
def test_any_object_is_a_grammar_or_an_error_with_its_path(schema: dict[str, Any]) -> None:
    try:
        grammar_of(schema)
    except InvalidInput as error:
        assert error.param is not None and error.param.startswith("S") and error.message
