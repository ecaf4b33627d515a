"""A JSON schema as the grammar of an answer, and where in a schema lies what cannot be followed.

Whatever a schema says is followed or refused: keywords that restrict values and are not implemented are errors, and so are values that
make no schema. Nothing here imports torch; `server.engine.grammar` follows what is made here.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

from anyio.to_thread import run_sync
from llguidance import LLMatcher

from quantizers.errors import InvalidInput

MAX_SCHEMA = 1 << 17  # characters; one of this length compiles within about two seconds
_SEARCHED = 500  # parts of a schema that are tried to find where it is wrong
# Between tokens of JSON: as much as a deep indentation has and no more, because small models can go on with white space for ever.
_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}", "lenient": False}
_SHARED = ("$defs", "definitions")  # what references point to
_MAPS = (*_SHARED, "properties", "patternProperties")  # keyword: {name: schema}
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # keyword: [schema]
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains")  # keyword: schema


async def schema_grammar(schema: dict[str, Any], param: str) -> str:
    """The grammar of the JSON texts that `schema` allows, checked in a thread and once for each schema.

    Raises InvalidInput, whose `param` is the path from `param` on to the innermost part that is wrong.
    """
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_SCHEMA:
        raise InvalidInput(f"{param}: the schema has {len(text)} characters, of which at most {MAX_SCHEMA} are allowed", param=param)
    path, reason = await run_sync(_first_fault, text)
    if reason:
        where = ".".join((param, *path))
        raise InvalidInput(f"{where}: this schema cannot be followed: {' '.join(reason.split())}", param=where, code="invalid_json_schema")
    return LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)


def embedded_schema(schema: dict[str, Any]) -> str:
    """`schema`, which `schema_grammar` took, as it stands in a larger grammar."""
    return json.dumps({**schema, "x-guidance": _OPTIONS}, ensure_ascii=False)


@functools.lru_cache(256)
def _first_fault(text: str) -> tuple[tuple[str, ...], str]:
    """Path of the innermost schema of the document `text` that cannot be followed, and why; no reason where all of it can."""
    document = json.loads(text)
    if "x-guidance" in document:
        return ("x-guidance",), "it is no keyword of JSON Schema"
    path: tuple[str, ...] = ()
    reason, part = _fault(document), document
    shared = {key: document[key] for key in _SHARED if key in document}
    tries = _SEARCHED
    while reason:
        for step, inner in _parts(part):
            tries -= 1
            if tries > 0 and isinstance(inner, dict) and _fault({**shared, **inner}) == reason:
                path, part = (*path, *step), inner
                break
        else:
            break
    return path, reason


def _fault(document: Any) -> str:
    """Why `document` as a whole cannot be followed; empty where it can."""
    try:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(document, overrides=_OPTIONS))
    except ValueError as error:
        return str(error)
    return messages[0] if wrong else ""


def _parts(schema: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The schemas inside `schema`, each with its path there; those that references point to first."""
    for keyword in _MAPS:
        if isinstance(inner := schema.get(keyword), dict):
            yield from (((keyword, name), part) for name, part in inner.items())
    for keyword in _LISTS:
        if isinstance(inner := schema.get(keyword), list):
            yield from (((keyword, str(index)), part) for index, part in enumerate(inner))
    for keyword in _SINGLE:
        if keyword in schema:
            yield (keyword,), schema[keyword]
