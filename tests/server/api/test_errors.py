"""Whatever is sent, the answer is the right 4xx in OpenAI's shape and names the field; the server goes on."""

import json
import socket
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GOOD_COMPLETION = {"model": "demo", "prompt": "a", "max_tokens": 1}
GOOD_CHAT = {"model": "demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


def check_shape(answer: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert error["param"] == param, error
    assert answer.headers["X-Request-Id"]
    return error


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ARGUMENTS = "messages.0.tool_calls.0.function.arguments"


def message(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


BAD_SHARED = [
    ({"model": "nobody"}, 404, "model"),
    ({"model": "../../etc"}, 404, "model"),
    ({"model": "demo@"}, 400, "model"),
    ({"model": "demo@x@y"}, 400, "model"),
    ({"model": "demo@rtn-w5"}, 400, "model"),
    ({"model": "demo@w4g64"}, 400, "model"),
    ({"model": ""}, 400, "model"),
    ({"model": 3}, 400, "model"),
    ({"temperature": "0.5"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 10**400}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 1.5}, 400, "top_k"),
    ({"min_p": 1.1}, 400, "min_p"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 300}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"min_tokens": 2}, 400, "min_tokens"),
    ({"seed": 2**63}, 400, "seed"),
    ({"seed": -(2**63) - 1}, 400, "seed"),
    ({"seed": 1.0}, 400, "seed"),
    ({"seed": "1"}, 400, "seed"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["a", ""]}, 400, "stop"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": 5}, 400, "stop"),
    ({"stop": ["x" * 1001]}, 400, "stop"),
    ({"stop_token_ids": [49152]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids.0"),
    ({"n": 0}, 400, "n"),
    ({"n": 9}, 400, "n"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"\u0663": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"5": True}}, 400, "logit_bias"),
    ({"logit_bias": {"49152": 1}}, 400, "logit_bias"),
    ({"stream": "true"}, 400, "stream"),
    ({"stream": 1}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x"),
    ({"stream": True, "stream_options": []}, 400, "stream_options"),
    ({"ignore_eos": 1}, 400, "ignore_eos"),
    ({"user": 5}, 400, "user"),
    ({"metadata": {"a": 1}}, 400, "metadata"),
    ({"temprature": 1}, 400, "temprature"),
]
BAD_COMPLETIONS = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [""]}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": {}}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": ["a", [1]]}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [49152]}, 400, "prompt"),
    ({"prompt": [[1], [10**12]]}, 400, "prompt"),
    ({"prompt": ["a"] * 65}, 400, "prompt"),
    ({"prompt": "a " * 300}, 400, "prompt"),
    ({"prompt": [5] * 256}, 400, "prompt"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"echo": "yes"}, 400, "echo"),
    ({"best_of": 21}, 400, "best_of"),
    ({"best_of": 1, "n": 2}, 400, "best_of"),
    ({"best_of": 2, "stream": True}, 400, "best_of"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"messages": []}, 400, "messages"),
]
BAD_CHATS = [
    ({"messages": []}, 400, "messages"),
    ({"messages": None}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": ["hi"]}, 400, "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
    ({"messages": [{"content": "a"}]}, 400, "messages.0.role"),
    ({"messages": message(None)}, 400, "messages.0.content"),
    ({"messages": message(5)}, 400, "messages.0.content"),
    ({"messages": message([])}, 400, "messages.0.content"),
    ({"messages": message([{"type": "image_url", "image_url": {"url": "x"}}])}, 400, "messages.0.content"),
    ({"messages": message([{"type": "text"}])}, 400, "messages.0.content"),
    ({"messages": message("a", role="tool")}, 400, "messages.0.tool_call_id"),
    ({"messages": message("a", role="function")}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, 400, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, 400, "messages.0.tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, 400, "messages.0"),
    ({"messages": [{"role": "tool", "tool_call_id": "a", "content": "b"}]}, 400, "messages.0"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}]}, 400, ARGUMENTS),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[]"}}]}]}, 400, ARGUMENTS),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]}, 400, ARGUMENTS),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]}, 400, "messages.0.tool_calls.0.type"),
    ({"messages": [*message("a"), {"role": "user", "content": "b", "x": 1}]}, 400, "messages.1.x"),
    ({"messages": message("word " * 300)}, 400, "messages"),
    ({"max_completion_tokens": 300, "max_tokens": None}, 400, "max_completion_tokens"),
    ({"max_completion_tokens": 2}, 400, "max_tokens"),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"top_logprobs": 1}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function"),
    ({"tools": [TOOL]}, 400, "tools"),
    ({"tools": [TOOL, TOOL]}, 400, "tools.1.function.name"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, 400, "tools.0.function.parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": ["f"]}}, 400, "tool_choice"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"tool_choice": "auto"}, 400, "tool_choice"),
    ({"parallel_tool_calls": False}, 400, "parallel_tool_calls"),
    ({"functions": []}, 400, "functions"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format.type"),
    ({"response_format": {}}, 400, "response_format.type"),
    ({"response_format": "json"}, 400, "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, 400, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, 400, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}}, 400, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"items": {"type": "objekt"}}}}},
        400,
        "response_format.json_schema.schema.items",
    ),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, 400, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 1}, 400, "min_tokens"),
    ({"prompt": "a"}, 400, "prompt"),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD_SHARED + BAD_COMPLETIONS)
def test_bad_completions(server: Any, change: dict[str, Any], status: int, param: str) -> None:
    check_shape(server.http.post("/v1/completions", json={**GOOD_COMPLETION, **change}), status, param)
    assert not server.engine.seen, "a bad request must not reach the engine"


@pytest.mark.parametrize(("change", "status", "param"), BAD_SHARED + BAD_CHATS)
def test_bad_chats(server: Any, change: dict[str, Any], status: int, param: str) -> None:
    check_shape(server.http.post("/v1/chat/completions", json={**GOOD_CHAT, **change}), status, param)
    assert not server.engine.seen


def test_context_errors_have_openais_code(server: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.completions.create(model="demo", prompt=[5] * 300)
    assert caught.value.code == "context_length_exceeded"


def test_a_default_limit_gives_way_to_a_long_prompt(server: Any) -> None:
    answer = server.openai.completions.create(model="demo", prompt=[5] * 250)
    assert answer.usage.completion_tokens == 6


RAW = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a string": b'"a"',
    "null": b"null",
    "NaN": b'{"model": "demo", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "demo", "prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"model": "demo", "prompt": "a", "temperature": 1e999}',
    "many digits": b'{"model": "demo", "prompt": "a", "seed": ' + b"9" * 6000 + b"}",
    "invalid UTF-8": b'{"model": "demo", "prompt": "\xff"}',
    "UTF-16": '{"model": "demo"}'.encode("utf-16"),
    "half a surrogate": b'{"model": "demo", "prompt": "\\ud83d"}',
    "half a surrogate as a key": b'{"model": "demo", "prompt": "a", "\\ud83d": 1}',
    "twice": b'{"model": "demo", "model": "demo", "prompt": "a"}',
    "deep lists": b'{"model": "demo", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "rather deep lists": b'{"model": "demo", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    "deep objects": b'{"metadata": ' * 60_000 + b"1" + b"}" * 60_000,
    "deep and cut off": b"[" * 200_000,
}


@pytest.mark.parametrize("body", RAW.values(), ids=RAW)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/uploads", "/v1/checkpoints", "/v1/quantize/jobs"])
def test_bodies_that_are_no_request(server: Any, route: str, body: bytes) -> None:
    answer = server.http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_above_the_limit(serve: Any) -> None:
    with serve(max_body_bytes=10_000) as server:
        body = json.dumps({**GOOD_COMPLETION, "user": "x" * 20_000}).encode()
        check_shape(server.http.post("/v1/completions", content=body), 413)
        chunked = server.http.post("/v1/completions", content=iter([body[:9000], body[9000:]]))
        check_shape(chunked, 413)
        assert server.http.post("/v1/completions", json=GOOD_COMPLETION).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v1/completions/", "/v2/models", "/%00", "/v1/quantize/jobs/nope", "/v1/uploads/nope"]
)
def test_unknown_routes_and_ids(server: Any, path: str) -> None:
    answer = server.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path", "allowed"), [("GET", "/v1/completions", "POST"), ("DELETE", "/health", "GET"), ("PUT", "/v1/uploads", "POST")]
)
def test_wrong_methods(server: Any, method: str, path: str, allowed: str) -> None:
    answer = server.http.request(method, path)
    check_shape(answer, 405)
    assert allowed in answer.headers["Allow"]


def test_a_server_fault_has_the_shape_too(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.engine.fail_after, server.engine.failure = 0, RuntimeError("a secret path")
    error = check_shape(server.http.post("/v1/completions", json=GOOD_COMPLETION), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_half_a_request_is_survived(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model"')
    assert server.http.post("/v1/completions", json=GOOD_COMPLETION).status_code == 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "stop",
    "seed",
    "n",
    "logprobs",
    "stream",
    "stream_options",
    "logit_bias",
    "echo",
    "x",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3), chat=st.booleans())
def test_no_body_makes_a_5xx(server: Any, change: dict[str, Any], chat: bool) -> None:
    good = GOOD_CHAT if chat else GOOD_COMPLETION
    answer = server.http.post("/v1/chat/completions" if chat else "/v1/completions", json={**good, **change})
    assert answer.status_code < 500, answer.text


def test_api_key(serve: Any) -> None:
    with serve(api_key="correct horse") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "correct horse"},
            {"Authorization": "Bearer ümlaut".encode()},
        ):
            answer = server.http.get("/v1/models", headers=headers)
            check_shape(answer, 401)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert server.http.get("/v1/models", headers={"Authorization": "Bearer correct horse"}).status_code == 200
        assert server.http.get("/health").status_code == server.http.get("/metrics").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.openai.models.list()


def test_several_api_keys(serve: Any) -> None:
    with serve(api_key="correct horse", api_keys=["battery staple"]) as server:
        for key, status in (("correct horse", 200), ("battery staple", 200), ("battery horse", 401), ("correct", 401)):
            assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
    with serve(api_keys=["battery staple"]) as server:
        assert server.http.get("/v1/models").status_code == 401
