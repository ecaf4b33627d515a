"""What an answer must follow so that its tool calls are ones that can be carried out: names that exist, arguments as their schemas say.

Grammars are in llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.grammar import embedded_schema
from server.text.tools import HERMES, LLAMA3, MISTRAL, ToolFormat

SpecialToken = Callable[[str], int | None]  # name -> id of the special token of that name, None where it is ordinary text


@dataclass(frozen=True)
class Function:
    """A function that may be called; `parameters` is the schema of its arguments, which are an object."""

    name: str
    parameters: dict[str, Any]


def forced_calls(tool_format: ToolFormat, functions: Sequence[Function], special: SpecialToken, *, single: bool) -> str:
    """Nothing but calls of `functions`: exactly one with `single`, else one or more."""
    more = "" if single else {HERMES: ' ("\\n" call)*', LLAMA3: ' ("; " call)*', MISTRAL: ' (", " call)*'}[tool_format]
    start = f"call{more}"
    if tool_format is MISTRAL:
        start = f'{_marker(MISTRAL.opening, special)} "[" {start} "]"'
    return _lark([f"start: {start}", *_call_rules(tool_format, functions, special)])


def calls_or_text(tool_format: ToolFormat, functions: Sequence[Function], special: SpecialToken, *, single: bool) -> str:
    """Text, calls of `functions`, or calls after text. Whatever begins like a call is one."""
    rules = _call_rules(tool_format, functions, special)
    if tool_format is LLAMA3:  # a call is the whole answer
        more = "" if single else ' ("; " call)*'
        return _lark([f"start: call{more} | TEXT", r"TEXT: /([^{\s](.|\n)*)?/", *rules])
    opening = _marker(tool_format.opening, special)
    lazy = "trigger[lazy]: TEXT " + opening if opening.startswith('"') else f"trigger: TEXT {opening}"
    if tool_format is MISTRAL:
        more = "" if single else ' (", " call)*'
        return _lark([f'start: trigger "[" call{more} "]" | TEXT', r"TEXT: /(.|\n)*/", lazy, *rules])
    return _lark([f"start: (trigger body){'?' if single else '*'} TEXT", r"TEXT: /(.|\n)*/", lazy, *rules])


def _call_rules(tool_format: ToolFormat, functions: Sequence[Function], special: SpecialToken) -> list[str]:
    names = " | ".join(f"f{index}" for index in range(len(functions)))
    rules = []
    if tool_format is HERMES:
        rules += [f"call: {_marker(HERMES.opening, special)} body", f'body: "\\n" ({names}) "\\n" {_marker(HERMES.closing, special)}']
    else:
        rules.append(f"call: {names}")
    for index, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{tool_format.arguments}": ')
        rules += [f'f{index}: {head} a{index} "}}"', f"a{index}: %json {embedded_schema(function.parameters)}"]
    return rules


def _marker(text: str, special: SpecialToken) -> str:
    token_id = special(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _lark(rules: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", *rules])
