"""The official Python client, every implemented field."""

import json
import sys

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", timeout=300, max_retries=0)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str
    age: int


def chat(**fields):
    return client.chat.completions.create(**{"model": "demo", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **fields})


answer = chat()
assert (
    "Paris" in answer.choices[0].message.content
    and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True) if chunk.choices)
assert streamed == answer.choices[0].message.content
print("ok: chat whole and streamed")

*_, last = chat(stream=True, stream_options={"include_usage": True})
assert last.usage.completion_tokens == answer.usage.completion_tokens
print("ok: usage")

choices = chat(n=3, temperature=1.0, seed=7).choices
assert [choice.message.content for choice in chat(n=3, temperature=1.0, seed=7).choices] == [choice.message.content for choice in choices]
assert len({choice.message.content for choice in choices}) > 1
print("ok: n, seed")

chat(
    top_p=0.9,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias={"100": -100},
    stop=["\n"],
    user="someone",
    metadata={"a": "b"},
    max_completion_tokens=5,
    max_tokens=None,
)
logprobs = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 and bytes(token.bytes).decode() == token.token for token in logprobs)
print("ok: sampling, stop, logprobs")

whole = client.completions.create(model="demo", prompt=["One, two,", "A, B,"], max_tokens=6, temperature=0, logprobs=2, echo=True)
assert [choice.text[:5] for choice in whole.choices] == ["One, ", "A, B,"] and whole.choices[0].logprobs.token_logprobs[0] is None
assert len(client.completions.create(model="demo", prompt="Once", max_tokens=4, n=1, best_of=3).choices) == 1
assert client.completions.create(model="demo", prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3
print("ok: completions with echo, logprobs, best_of, token ids")

person = client.chat.completions.parse(
    model="demo", messages=[{"role": "user", "content": "Invent a person."}], response_format=Person, max_tokens=200, seed=1
)
assert isinstance(person.choices[0].message.parsed, Person) or person.choices[0].finish_reason == "length"
whole_object = chat(response_format={"type": "json_object"}, max_tokens=300).choices[0]
assert whole_object.finish_reason == "length" or isinstance(json.loads(whole_object.message.content), dict)
print("ok: response_format")

call = chat(model="tools", tools=[TOOL], tool_choice="required", max_tokens=100, parallel_tool_calls=False).choices[0]
assert call.finish_reason == "tool_calls" and call.message.tool_calls[0].function.name == "weather"
arguments = json.loads(call.message.tool_calls[0].function.arguments)
assert set(arguments) == {"city"}
history = [*MESSAGES, call.message, {"role": "tool", "tool_call_id": call.message.tool_calls[0].id, "content": "sunny"}]
assert chat(model="tools", tools=[TOOL], messages=history).choices[0].finish_reason in ("stop", "length", "tool_calls")
named = {"type": "function", "function": {"name": "weather"}}
with client.chat.completions.stream(model="tools", messages=MESSAGES, tools=[TOOL], tool_choice=named, max_tokens=100) as stream:
    assert stream.get_final_completion().choices[0].message.tool_calls[0].function.name == "weather"
print("ok: tools, streamed and not")

assert {"demo", "demo@bf16", "tools"} <= {model.id for model in client.models.list()}
assert client.models.retrieve("demo@bf16").id == "demo@bf16"
for kind, ask in ((openai.NotFoundError, {"model": "nobody"}), (openai.BadRequestError, {"temperature": 3})):
    try:
        chat(**ask)
    except kind as error:
        assert error.body["message"] and error.param in ask
    else:
        raise AssertionError(f"{ask} was taken")
print("ok: models, errors")
