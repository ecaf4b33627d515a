"""Tool calls are found in the text in whatever pieces it comes, and text that is no call stays as it is."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.tools import HERMES, LLAMA3, MISTRAL, ToolFormat, ToolParser, format_of, merged

Calls = list[tuple[str, str]]
WEATHER, TIME = '{"city": "Zürich \\"}{\\" 🎉", "days": [1, {"a": "]"}]}', "{}"


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls)


def mistral(*calls: tuple[str, str]) -> str:
    return "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in calls) + "]"


def llama(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


def parse(tool_format: ToolFormat, pieces: list[str], *, single: bool = False) -> tuple[str, Calls]:
    parser = ToolParser(tool_format, single=single)
    parsed = [parser.add(piece) for piece in pieces if not parser.complete]
    parsed.append(parser.finish())
    calls = merged([delta for part in parsed for delta in part.calls])
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls) and all(call.id for call in calls)
    return "".join(part.text for part in parsed), [(call.name or "", call.arguments) for call in calls]


def cut(text: str, seed: int) -> list[str]:
    """`text` in random pieces."""
    choose = random.Random(seed)
    at = sorted(choose.sample(range(len(text) + 1), min(len(text), choose.randint(0, 12))))
    return [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


CASES = [
    (HERMES, hermes(("weather", WEATHER)), "", [("weather", WEATHER)]),
    (HERMES, "Let me see.\n" + hermes(("weather", WEATHER), ("time", TIME)), "Let me see.", [("weather", WEATHER), ("time", TIME)]),
    (HERMES, hermes(("time", TIME)) + "\nThat is all.", "\nThat is all.", [("time", TIME)]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, "1 < 2, and <tool is no call ", "1 < 2, and <tool is no call ", []),
    (HERMES, '<tool_call>{"title": "no call"}</tool_call>', '<tool_call>{"title": "no call"}</tool_call>', []),
    (HERMES, "See <tool_call> never an object", "See <tool_call> never an object", []),
    (HERMES, "a <tool_call>", "a <tool_call>", []),
    (LLAMA3, llama(("weather", WEATHER)), "", [("weather", WEATHER)]),
    (LLAMA3, "<|python_tag|>" + llama(("weather", WEATHER), ("time", TIME)), "", [("weather", WEATHER), ("time", TIME)]),
    (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA3, '{"long": "' + "x" * 400 + '"} and more', '{"long": "' + "x" * 400 + '"} and more', []),
    (LLAMA3, 'Text first, then {"name": "f", "parameters": {}}', 'Text first, then {"name": "f", "parameters": {}}', []),
    (MISTRAL, mistral(("weather", WEATHER), ("time", TIME)), "", [("weather", WEATHER), ("time", TIME)]),
    (MISTRAL, "Well: " + mistral(("time", TIME)), "Well:", [("time", TIME)]),
    (MISTRAL, "[TOOL is not [TOOL_CALL", "[TOOL is not [TOOL_CALL", []),
]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_in_any_pieces(tool_format: ToolFormat, text: str, content: str, calls: Calls, seed: int) -> None:
    assert parse(tool_format, cut(text, seed)) == (content, calls)


@pytest.mark.parametrize(
    ("tool_format", "text"), [(HERMES, hermes(("f", WEATHER))), (LLAMA3, llama(("f", WEATHER))), (MISTRAL, mistral(("f", WEATHER)))]
)
def test_arguments_stream_as_they_come(tool_format: ToolFormat, text: str) -> None:
    parser = ToolParser(tool_format)
    deltas = [delta for character in text for delta in parser.add(character).calls]
    first, *rest = deltas
    assert (first.name, first.arguments) == ("f", "") and first.id
    assert len(rest) == len(WEATHER) and "".join(delta.arguments for delta in rest) == WEATHER


@pytest.mark.parametrize("size", range(1, 60, 3))
def test_a_call_that_is_cut_off_keeps_what_there_is(size: int) -> None:
    text = hermes(("weather", WEATHER))[:size]
    content, calls = parse(HERMES, list(text))
    if calls:
        assert content == "" and WEATHER.startswith(calls[0][1])
    else:
        assert content == text


def test_after_the_first_nothing_counts_where_one_is_wanted() -> None:
    parser = ToolParser(HERMES, single=True)
    parsed = parser.add("So: " + hermes(("a", TIME), ("b", TIME)))
    assert parser.complete and [call.name for call in merged(parsed.calls)] == ["a"] and parsed.text == "So:"


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    '{"name": "f", "arguments": {',
    ":",
    ",",
    "<|python_tag|>",
    ";",
    " ",
    "x",
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.lists(st.sampled_from(PARTS), max_size=25))
def test_whatever_comes_is_text_or_calls(tool_format: ToolFormat, parts: list[str]) -> None:
    whole, pieces = parse(tool_format, ["".join(parts)]), parse(tool_format, parts)
    assert whole == pieces
    if not whole[1]:
        assert whole[0] == "".join(parts), "text that is no call is changed"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}", HERMES),
        ("{% if tools %}<tool_call><function=name>{% endif %}", None),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", MISTRAL),
        ("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}", None),
        ("{% if tools is not none %}Environment: ipython{% endif %}{\"name\": x, \"parameters\": y}", LLAMA3),
        ("{% if tools %}call them somehow{% endif %}", None),
    ],
)  # fmt: skip
def test_the_format_is_the_templates(template: str, expected: ToolFormat | None) -> None:
    assert format_of(template) == expected


def test_ids_are_what_the_formats_templates_take() -> None:
    assert len(MISTRAL.new_id()) == 9 and MISTRAL.new_id().isalnum()
    assert HERMES.new_id().startswith("call_") and HERMES.new_id() != HERMES.new_id()
    assert json.loads(WEATHER)["days"][0] == 1
