"""litellm, with the server as an OpenAI-compatible provider."""

import sys

import litellm

ASK = {"model": "openai/demo", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_tokens": 12, "temperature": 0, "timeout": 300}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
answer = litellm.completion(messages=MESSAGES, **ASK)
assert "Paris" in answer.choices[0].message.content and answer.usage.completion_tokens > 0
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=MESSAGES, stream=True, **ASK))
assert streamed == answer.choices[0].message.content
print("ok: completion and stream")
assert litellm.text_completion(prompt="One, two,", **{**ASK, "model": "text-completion-openai/demo"}).choices[0].text
print("ok: text completion")
tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]},
    },
}
called = litellm.completion(messages=MESSAGES, tools=[tool], tool_choice="required", **{**ASK, "model": "openai/tools", "max_tokens": 200})
assert called.choices[0].message.tool_calls[0].function.name == "weather"
print("ok: tools")
try:
    litellm.completion(messages=MESSAGES, **{**ASK, "model": "openai/nobody"})
except litellm.exceptions.NotFoundError:
    print("ok: errors")
