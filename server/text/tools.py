"""Tool calls in the formats that chat templates teach models: which one a template has, and reading calls out of the text as it comes.

Hermes and Qwen   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them, after text or none
Llama 3           {"name": ..., "parameters": {...}} as the whole answer, behind <|python_tag|> or not, several with ; between
Mistral           [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]

Text that is no call stays text, also where it began like one. Which grammar calls follow is `tool_grammar`'s matter.
"""

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_UNDECIDED = 300  # characters after which an object that does not begin like a call is none: names are at most 64
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in the text: `opening` begins them, `closing` ends one, characters of `between` may stand before one.

    `arguments` is the key of a call's arguments.
    """

    name: Literal["hermes", "llama3", "mistral"]
    opening: str
    closing: str
    between: str
    arguments: str

    def new_id(self) -> str:
        """An id for a call; Mistral's templates take nine letters and digits and nothing else."""
        length, prefix = (9, "") if self.name == "mistral" else (24, "call_")
        return prefix + "".join(secrets.choice(_ID_CHARACTERS) for _ in range(length))


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", "", "arguments")
LLAMA3 = ToolFormat("llama3", "<|python_tag|>", "", ";", "parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", "[,", "arguments")


def template_has_tools(template: str | None) -> bool:
    return re.search(r"\btools\b", template or "") is not None


def format_of(template: str) -> ToolFormat | None:
    """The format that `template` writes calls in, None where it has no tools or calls in none of the known formats."""
    if not template_has_tools(template):
        return None
    if HERMES.opening in template and "<function=" not in template:
        return HERMES
    if MISTRAL.opening in template and "[ARGS]" not in template:
        return MISTRAL
    if '"parameters"' in template and ("ipython" in template or LLAMA3.opening in template):
        return LLAMA3
    return None


@dataclass(frozen=True)
class CallDelta:
    """More of call `index`: its id and name with the first of it, then pieces of its arguments as JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Parsed:
    """What more of a text was: ordinary text, and parts of calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class _Object:
    """A JSON object as it comes, character by character: where it ends, and where in it the arguments of a call are."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self.name: str | None = None  # once it is known to be a call
        self.given = 0  # characters of `text` that were given out as arguments, or precede them
        self._depth = 0
        self._in_string = self._escaped = False
        self._arguments_end: int | None = None

    def add(self, text: str) -> str:
        """Take characters up to the end of the object; returns those behind it."""
        for at, character in enumerate(text):
            self._take(character)
            if self.done:
                self.text += text[: at + 1]
                self._find_name()
                return text[at + 1 :]
            if self._depth == 1 and character in "}]" and self.name is not None and self._arguments_end is None:
                self._arguments_end = len(self.text) + at + 1
        self.text += text
        self._find_name()
        return ""

    def _take(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth == 0

    def _find_name(self) -> None:
        if self.name is None and (head := _HEAD.match(self.text)):
            try:
                self.name = str(json.loads(head[1]))
            except ValueError:
                return
            self.given = head.end()
            self._arguments_end = _object_end(self.text, head.end())

    @property
    def undecided(self) -> bool:
        """Whether it may still turn out to be a call."""
        return self.name is None and len(self.text) <= _UNDECIDED

    def arguments(self) -> str:
        """Arguments that have come and were not given out yet."""
        end = len(self.text) if self._arguments_end is None else self._arguments_end
        piece, self.given = self.text[self.given : end], max(self.given, end)
        return piece

    def as_call(self) -> tuple[str, str] | None:
        """Name and arguments of a whole object whose keys stand in another order, or whose arguments are a string; None for no call."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(value.get("name"), str) or not isinstance(arguments, dict | str):
            return None
        return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _object_end(text: str, start: int) -> int | None:
    """Index behind the object that begins at `start`, None where it has no end yet."""
    inner = _Object()
    for at in range(start, len(text)):
        inner._take(text[at])
        if inner.done:
            return at + 1
    return None


class ToolParser:
    """Fed with an answer's text in pieces; gives out the same text without its calls, and the calls.

    It stands in ordinary text, or in a region of calls (behind an opening, or in Llama's bare objects), or in an object there.
    """

    def __init__(self, tool_format: ToolFormat, *, single: bool = False) -> None:
        """`single`: nothing counts after the first call."""
        self._format, self._single = tool_format, single
        self._held = ""  # came and is not decided
        self._region: str | None = None  # in one: what of it would be text if no call followed; empty behind a call
        self._object: _Object | None = None
        self._begun = False  # with text that was no call
        self.calls = 0

    @property
    def complete(self) -> bool:
        """Nothing that follows would count."""
        return self._single and self.calls > 0 and self._object is None

    def add(self, text: str) -> Parsed:
        """What is certain after `text`."""
        self._held += text
        return self._collect()

    def finish(self) -> Parsed:
        """What was held back, when no more text follows. A call that was cut off keeps what there is of it."""
        parsed = self._collect()
        rest = "" if self.complete else (self._region or "") + (self._object.text if self._object and not self._object.name else self._held)
        self._held, self._region, self._object = "", None, None
        return Parsed(parsed.text + (rest if rest.strip() or not self.calls else ""), parsed.calls)

    def _collect(self) -> Parsed:
        texts: list[str] = []
        calls: list[CallDelta] = []
        while self._held and not self.complete:
            if self._object is not None:
                self._read_object(self._object, texts, calls)
            elif not (self._read_text(texts) if self._region is None else self._read_region(self._region, texts)):
                break
        return Parsed("".join(texts), tuple(calls))

    def _read_text(self, texts: list[str]) -> bool:
        """Up to where calls begin, or may; returns whether they do."""
        held, opening = self._held, self._format.opening
        bare = held.lstrip()
        if self._format is LLAMA3 and not self._begun and bare.startswith("{"):
            self._region, self._object, self._held = held[: -len(bare)], _Object(), bare
            return True
        at = held.find(opening)
        if at < 0:
            at = len(held) - next((size for size in range(len(opening) - 1, 0, -1) if held.endswith(opening[:size])), 0)
        before = held[:at].rstrip()  # white space before a call is the format's, not the text's
        self._out(before, texts)
        self._held = held[len(before) :]
        if not held.startswith(opening, at):
            return False
        self._region, self._held = held[len(before) : at] + opening, held[at + len(opening) :]
        return True

    def _read_region(self, region: str, texts: list[str]) -> bool:
        """To the next object, or to the end of the calls; returns whether either came."""
        held, closing = self._held.lstrip(), self._format.closing
        space = self._held[: len(self._held) - len(held)]
        if held.startswith("{"):
            self._region, self._object, self._held = region and region + space, _Object(), held
        elif held and held[0] in self._format.between:
            self._region, self._held = region and region + space + held[0], held[1:]
        elif not held or (closing.startswith(held) and closing != held):
            return False
        elif not region:  # the end of calls
            self._region, self._held = None, held.removeprefix(closing) if closing else held.removeprefix("]")
        else:  # an opening without a call
            self._out(region + space, texts)
            self._region, self._held = None, held
        return True

    def _read_object(self, found: _Object, texts: list[str], calls: list[CallDelta]) -> None:
        known = found.name is not None
        self._held = found.add(self._held)
        if found.name is not None:
            if not known:
                calls.append(self._new_call(found.name))
            if piece := found.arguments():
                calls.append(CallDelta(self.calls - 1, arguments=piece))
        elif found.done and (whole := found.as_call()) is not None:
            calls += [self._new_call(whole[0]), CallDelta(self.calls - 1, arguments=whole[1])]
        elif found.done or not found.undecided:
            self._out((self._region or "") + found.text, texts)
            self._region = self._object = None
        if found.done:
            self._object = None

    def _new_call(self, name: str) -> CallDelta:
        self._region = ""
        self.calls += 1
        return CallDelta(self.calls - 1, self._format.new_id(), name)

    def _out(self, text: str, texts: list[str]) -> None:
        self._begun = self._begun or bool(text.strip())
        texts.append(text)


def merged(deltas: Sequence[CallDelta]) -> list[CallDelta]:
    """Whole calls, in order, of all their deltas."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        call = calls.get(delta.index, CallDelta(delta.index))
        calls[delta.index] = CallDelta(delta.index, call.id or delta.id, call.name or delta.name, call.arguments + delta.arguments)
    return [calls[index] for index in sorted(calls)]
