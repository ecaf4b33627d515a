"""What the grammars of tool calls let through, token by token, over the demo's tokenizer; what they let through is read as calls."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.grammar import Constraint, Grammars
from server.engine.interface import Sampling
from server.engine.sampler import Sampler
from server.text.tokenizer import Tokenizer
from server.text.tool_grammar import Function, calls_or_text, forced_calls
from server.text.tools import HERMES, LLAMA3, MISTRAL, ToolFormat, ToolParser, merged

CITY = {"type": "string", "maxLength": 8}
WEATHER = Function("weather", {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False})
CLOCK = Function("clock", {"type": "object", "additionalProperties": False})
MARKER = 17  # a special token of the demo that stands for Mistral's
END = 2
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
LLAMA_NOW, MISTRAL_NOW = '{"name": "clock", "parameters": {}}', '{"name": "clock", "arguments": {}}'


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer(demo)


@pytest.fixture(scope="module")
def grammars(demo: Path) -> Grammars:
    return Grammars(demo)


def special(name: str) -> int | None:
    return MARKER if name == MISTRAL.opening else None


def allows(grammars: Grammars, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether every token of `text`, and the end behind it, is allowed where it comes."""
    constraint = Constraint(grammars.compile(grammar).result(), vocab_size=49152, end_ids=[END], device=torch.device("cpu"))
    before, *rest = (tokenizer.encode_now(part, special=False) for part in text.split(MISTRAL.opening))
    for token in [*before, *(token for part in rest for token in (MARKER, *part)), END]:
        if constraint.forbidden()[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("tool_format", "text", "forced", "single", "text_too"),
    [
        (HERMES, CALL, True, True, True),
        (HERMES, f"{CALL}\n{NOW}", True, False, True),
        (HERMES, f"I ask. {CALL}", False, False, True),
        (HERMES, "Only text < {", False, False, True),
        (HERMES, "", False, False, True),
        (HERMES, CALL.replace("weather", "whether"), False, False, False),
        (HERMES, CALL.replace("city", "town"), False, False, False),
        (HERMES, CALL.replace("Rome", "far too long"), False, False, False),
        (LLAMA3, LLAMA_NOW, True, True, True),
        (LLAMA3, f"{LLAMA_NOW}; {LLAMA_NOW}", True, False, True),
        (LLAMA3, "Only text {", False, False, True),
        (LLAMA3, '{"name": "block", "parameters": {}}', False, False, False),
        (MISTRAL, f"[TOOL_CALLS][{MISTRAL_NOW}]", True, True, True),
        (MISTRAL, f"[TOOL_CALLS][{MISTRAL_NOW}, {MISTRAL_NOW}]", True, False, True),
        (MISTRAL, f"I ask. [TOOL_CALLS][{MISTRAL_NOW}]", False, False, True),
        (MISTRAL, "Only text [", False, False, True),
        (MISTRAL, "[TOOL_CALLS]Only text", False, False, False),
    ],
)
def test_what_is_allowed(
    grammars: Grammars, tokenizer: Tokenizer, tool_format: ToolFormat, text: str, forced: bool, single: bool, text_too: bool
) -> None:
    """`forced`: as one or more calls and nothing else; `single`: as exactly one call; `text_too`: as text or calls."""
    functions = (WEATHER, CLOCK)
    made: list[tuple[Callable[..., str], bool, bool]] = [
        (forced_calls, False, forced),
        (forced_calls, True, single),
        (calls_or_text, False, text_too),
    ]
    for make, only_one, expected in made:
        assert allows(grammars, tokenizer, make(tool_format, functions, special, single=only_one), text) is expected


@pytest.mark.parametrize("tool_format", [HERMES, LLAMA3, MISTRAL], ids=lambda found: found.name)
def test_random_logits_make_calls_that_are_read(grammars: Grammars, tokenizer: Tokenizer, tool_format: ToolFormat) -> None:
    grammar = forced_calls(tool_format, (WEATHER, CLOCK), special, single=True)
    names = set()
    for seed in range(6):
        constraint = Constraint(grammars.compile(grammar).result(), vocab_size=49152, end_ids=[END], device=torch.device("cpu"))
        options = Sampling(max_tokens=300, seed=seed)
        sampler = Sampler(options, (0,), end_ids=[END], device=torch.device("cpu"), constraint=constraint)
        noise, text = torch.Generator().manual_seed(seed), ""
        detokenizer = tokenizer.detokenizer()
        while not sampler.complete:
            token, _ = sampler.next(3 * torch.randn(49152, generator=noise))
            text += MISTRAL.opening if token == MARKER else detokenizer.add(token)
        parser = ToolParser(tool_format)
        parsed = parser.add(text), parser.finish()
        (call,) = merged([delta for part in parsed for delta in part.calls])
        arguments = json.loads(call.arguments)
        assert "".join(part.text for part in parsed) == ""
        assert arguments == {} if call.name == "clock" else (call.name == "weather" and len(arguments["city"]) <= 8)
        names.add(call.name)
    assert names == {"weather", "clock"}
