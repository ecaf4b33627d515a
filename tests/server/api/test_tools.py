"""Tool calls through the official client, with small checkpoints whose templates write calls in the three known formats."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %}{{ tool | tojson }}{% endfor %} OPENING {% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{% if message.tool_call_id %} for {{ message.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
OPENINGS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": '<|python_tag|> with {"parameters"}'}
ANSWERS = {
    "hermes": 'I ask.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich 🎉"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Zürich 🎉"}}]',
    "llama3": '{"name": "weather", "parameters": {"city": "Zürich 🎉"}}',
}


@pytest.fixture(scope="module", autouse=True)
def checkpoints(demo_store: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for name, opening in OPENINGS.items():
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(tiny, folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("OPENING", opening.replace("{", "{{ '{' }}", 1)))
        demo_store.checkpoints.import_folder(name, folder)
    yield
    for name in OPENINGS:
        demo_store.checkpoints.delete(name)


def say(server: Any, text: str) -> None:
    """The engine's answer to everything from now on."""
    server.engine.script = server.tokenizer.encode_now(text)
    server.engine.begin_at, server.engine.eos_after = 0, len(server.engine.script)


@pytest.fixture(autouse=True)
def script(server: Any) -> Iterator[None]:
    before = server.engine.script
    yield
    server.engine.script = before


def ask(server: Any, model: str, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": model, "messages": MESSAGES, "tools": [WEATHER], **fields})


@pytest.mark.parametrize("model", OPENINGS)
def test_a_call_whole_and_streamed(server: Any, model: str) -> None:
    say(server, ANSWERS[model])
    whole = ask(server, model).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", {"city": "Zürich 🎉"})
    assert whole.finish_reason == "tool_calls" and whole.message.content == ("I ask." if model == "hermes" else None)
    chunks = [chunk.choices[0] for chunk in ask(server, model, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert deltas[0].id and (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", "weather")
    assert len(deltas) > 3 and all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert "".join(chunk.delta.content or "" for chunk in chunks) == (whole.message.content or "")
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_clients_own_accumulation_of_a_stream(server: Any) -> None:
    say(server, ANSWERS["hermes"])
    with server.openai.chat.completions.stream(model="hermes", messages=MESSAGES, tools=[WEATHER]) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Zürich 🎉"}


def test_text_stays_text(server: Any) -> None:
    say(server, "I need no tool for that: {1, 2} <tool")
    choice = ask(server, "hermes").choices[0]
    assert (choice.message.content, choice.message.tool_calls) == ("I need no tool for that: {1, 2} <tool", None)
    assert choice.finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in ask(server, "hermes", stream=True)) == choice.message.content


def test_several_calls_or_only_the_first(server: Any) -> None:
    say(server, '<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n' + ANSWERS["hermes"].removeprefix("I ask.\n"))
    both = ask(server, "hermes", tools=[WEATHER, CLOCK]).choices[0].message.tool_calls
    assert [call.function.name for call in both] == ["clock", "weather"] and both[0].id != both[1].id
    first = ask(server, "hermes", tools=[WEATHER, CLOCK], parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in first.message.tool_calls] == ["clock"] and first.finish_reason == "tool_calls"
    server.wait_for(lambda: server.engine.closed)


def test_a_call_that_is_cut_off_ends_for_its_length(server: Any) -> None:
    say(server, ANSWERS["llama3"])
    choice = ask(server, "llama3", max_tokens=len(server.engine.script) - 3).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city": "Z')


def test_tools_and_results_reach_the_template(server: Any) -> None:
    say(server, "It rains.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    ask(server, "hermes", messages=history)
    prompt = server.tokenizer.backend.decode(server.engine.seen[0].prompt_token_ids)
    assert '"name": "weather"' in prompt and "strict" not in prompt
    assert 'CALL weather {"city": "Rome"}' in prompt and "<|im_start|>tool\nrain for call_1" in prompt
    ask(server, "hermes", messages=history, tool_choice="none")
    assert "tools:" not in server.tokenizer.backend.decode(server.engine.seen[1].prompt_token_ids)


def test_none_reads_no_calls(server: Any) -> None:
    say(server, ANSWERS["hermes"])
    choice = ask(server, "hermes", tool_choice="none").choices[0]
    assert choice.message.content == ANSWERS["hermes"] and choice.finish_reason == "stop"


@pytest.mark.parametrize("model", OPENINGS)
def test_choices_become_grammars(server: Any, model: str) -> None:
    say(server, ANSWERS[model])
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    named = {"type": "function", "function": {"name": "clock"}}
    ask(server, model, tools=[WEATHER, CLOCK])
    ask(server, model, tools=[WEATHER, CLOCK], tool_choice="auto", parallel_tool_calls=False)
    ask(server, model, tools=[strict, CLOCK])
    ask(server, model, tools=[WEATHER, CLOCK], tool_choice="required")
    ask(server, model, tools=[WEATHER, CLOCK], tool_choice=named)
    free, single, lazy, required, one = (request.sampling.grammar for request in server.engine.seen)
    assert free is None and single is None, "a model that knows its format is left alone"
    assert all(name in lazy and name in required for name in ("weather", "clock")) and "TEXT" in lazy and "TEXT" not in required
    assert "clock" in one and "weather" not in one


@pytest.mark.parametrize(("parameters", "path"), [({"properties": {"a": {"type": "objekt"}}}, ".properties.a"), ({"not": {}}, "")])
def test_a_schema_that_cannot_be_followed_is_refused_where_it_must_be(server: Any, parameters: dict[str, Any], path: str) -> None:
    say(server, "Hello.")
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    ask(server, "hermes", tools=[tool])
    strict = {**tool, "function": {**tool["function"], "strict": True}}
    for fields in ({"tools": [tool], "tool_choice": "required"}, {"tools": [strict]}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, "hermes", **fields)
        assert caught.value.param == f"tools.0.function.parameters{path}"


def test_a_template_without_tools_says_what_to_do(server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="response_format") as caught:
        ask(server, "demo")
    assert (caught.value.param, caught.value.code) == ("tools", "tools_not_supported")
    say(server, "Hello.")
    assert ask(server, "demo", tool_choice="none").choices[0].message.content == "Hello."
