"""Both generation routes through the official client: what is asked for is what comes, streamed or not."""

import json
from typing import Any

import openai
import pytest

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld 👋"}]


def stream_text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_completion_streams_the_same_text_as_whole(server: Any, count: int) -> None:
    whole = server.openai.completions.create(model="demo", prompt="Hi", max_tokens=count)
    pieces = list(server.openai.completions.create(model="demo", prompt="Hi", max_tokens=count, stream=True))
    assert whole.choices[0].text == server.script_text("Hi", count)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "length"
    assert all("\ufffd" not in piece.choices[0].text for piece in pieces[:-1]), "a character was split"


def test_chat_streams_the_same_text_as_whole(server: Any) -> None:
    server.engine.eos_after = 30
    whole = server.openai.chat.completions.create(model="demo@bf16", messages=MESSAGES)
    chunks = list(server.openai.chat.completions.create(model="demo@bf16", messages=MESSAGES, stream=True))
    assert stream_text(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert whole.model == "demo@bf16"


def test_chat_uses_the_checkpoints_template_and_the_rest_of_the_context(server: Any) -> None:
    server.engine.eos_after = 1
    server.openai.chat.completions.create(model="demo", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    request = server.engine.seen[0]
    text = server.tokenizer.backend.decode(request.prompt_token_ids)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


def test_developer_is_system(server: Any) -> None:
    server.openai.chat.completions.create(
        model="demo", max_completion_tokens=1, messages=[{"role": "developer", "content": "X"}, {"role": "user", "content": "Y"}]
    )
    assert "<|im_start|>system\nX" in server.tokenizer.backend.decode(server.engine.seen[0].prompt_token_ids)


def test_usage_whole_and_streamed(server: Any) -> None:
    ask: dict[str, Any] = {"model": "demo", "prompt": ["a b c", "d"], "n": 2, "max_tokens": 5}
    expected = {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}
    whole = server.openai.completions.create(**ask)
    assert whole.usage.model_dump(include=set(expected)) == expected
    assert whole.usage.prompt_tokens_details.cached_tokens == 2, "one for each prompt, whose second choice adds none"
    *chunks, last = server.openai.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)


def test_continuous_usage_counts_up(server: Any) -> None:
    chunks = server.openai.completions.create(
        model="demo", prompt="a", max_tokens=9, stream=True, extra_body={"stream_options": {"continuous_usage_stats": True}}
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 9


def test_several_prompts_and_choices_are_indexed_and_seeded(server: Any) -> None:
    answer = server.openai.completions.create(model="demo", prompt=["one", "two"], n=2, seed=5, max_tokens=12)
    expected = [server.script_text(prompt, 12, seed) for prompt in ("one", "two") for seed in (5, 6)]
    assert [choice.text for choice in answer.choices] == expected
    streamed = ["", "", "", ""]
    for chunk in server.openai.completions.create(model="demo", prompt=["one", "two"], n=2, seed=5, max_tokens=12, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_best_of_gives_the_likeliest_and_counts_all(server: Any) -> None:
    server.engine.likelihood = {0: -3.0, 1: -0.5, 2: -2.0, 3: -0.7}
    answer = server.openai.completions.create(model="demo", prompt=["one", "two"], n=2, best_of=4, seed=0, max_tokens=12)
    expected = [server.script_text(prompt, 12, seed) for prompt in ("one", "two") for seed in (1, 3)]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    assert all(choice.logprobs is None for choice in answer.choices), "nobody asked for them"
    assert answer.usage.completion_tokens == 8 * 12 and answer.usage.prompt_tokens == 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    (one,) = server.openai.completions.create(model="demo", prompt="one", best_of=4, seed=0, max_tokens=12, logprobs=1).choices
    assert one.text == server.script_text("one", 12, 1) and one.logprobs.token_logprobs == [-0.5] * 12


def test_a_request_of_many_choices_does_not_fill_the_queue_by_itself(server: Any) -> None:
    server.engine.token_seconds = 0.01
    answer = server.openai.completions.create(model="demo", prompt=[f"{index}" for index in range(64)], n=2, max_tokens=1)
    assert len(answer.choices) == 128 and server.engine.most_at_once <= 32


def test_response_format_reaches_the_engine_as_a_grammar(server: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
    described = {"name": "place", "strict": True, "schema": schema, "description": "Where?"}
    for response_format in ({"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": described}):
        ask: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 1, "response_format": response_format}
        server.openai.chat.completions.create(**ask)
        assert list(server.openai.chat.completions.create(**ask, stream=True))
    plain, _, any_object, _, whole, again = (request.sampling.grammar for request in server.engine.seen)
    assert plain is None
    assert json.loads(any_object)["grammars"][0]["json_schema"]["type"] == "object"
    assert json.loads(whole)["grammars"][0]["json_schema"]["properties"] == schema["properties"] and whole == again


def test_seed_wraps_in_64_bits(server: Any) -> None:
    server.openai.completions.create(model="demo", prompt="a", n=2, seed=2**63 - 1, max_tokens=1)
    assert {request.sampling.seed for request in server.engine.seen} == {2**63 - 1, -(2**63)}


def test_token_ids_are_prompts(server: Any) -> None:
    answer = server.openai.completions.create(model="demo", prompt=[[5, 6, 7], [8]], max_tokens=1)
    assert len(answer.choices) == 2
    assert [request.prompt_token_ids for request in server.engine.seen] == [(5, 6, 7), (8,)]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it_and_the_request(server: Any, stream: bool) -> None:
    full = server.script_text("Hi", 60)
    stop = full[20:29]
    answer = server.openai.completions.create(model="demo", prompt="Hi", max_tokens=60, stop=["never there", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == full[: full.index(stop)]
    assert choices[-1].finish_reason == "stop"
    server.wait_for(lambda: server.engine.closed)


def test_sampling_reaches_the_engine(server: Any) -> None:
    fields = {"min_p": 0.1, "top_k": 7, "min_tokens": 2, "ignore_eos": True, "repetition_penalty": 1.2, "stop_token_ids": [9]}
    server.openai.completions.create(
        model="demo",
        prompt="a",
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": -100},
        user="someone",
        extra_body={**fields, "metadata": {"a": "b"}, "suffix": None, "unheard_of": None},
    )
    sampling = server.engine.seen[0].sampling.model_dump()
    assert sampling | {**fields, "stop_token_ids": (9,)} == sampling
    assert (sampling["temperature"], sampling["top_p"], sampling["logit_bias"]) == (0, 0.5, {7: -100})
    assert (sampling["presence_penalty"], sampling["frequency_penalty"]) == (1, -1)


def test_completion_logprobs(server: Any) -> None:
    choice = server.openai.completions.create(model="demo", prompt="Hi", max_tokens=30, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 30
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, offset)
    assert logprobs.token_logprobs == [-1.0] * 30
    assert all(top[token] == -1.0 and len(top) == 2 for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def test_echo_begins_with_the_prompt_and_its_logprobs(server: Any) -> None:
    prompt = "Où est 猫?"
    choice = server.openai.completions.create(model="demo", prompt=prompt, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert choice.text == prompt and choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(server.tokenizer.encode_now(prompt))
    assert server.engine.seen[0].sampling.prompt_logprobs == 1


def test_chat_logprobs_carry_bytes(server: Any) -> None:
    ask: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 40, "logprobs": True, "top_logprobs": 3}
    whole = server.openai.chat.completions.create(**ask)
    content = whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace") == whole.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in content)
    streamed = [
        token for chunk in server.openai.chat.completions.create(**ask, stream=True) for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_answers_name_request_and_precision(server: Any) -> None:
    body = {"model": "demo", "prompt": "a", "max_tokens": 1}
    given = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == "abc-1" and given.headers["X-Served-Precision"] == "bf16"
    for bad in ("a b", "x" * 129, ""):
        made = server.http.post("/v1/completions", json={**body, "stream": True}, headers={"X-Request-Id": bad})
        assert made.headers["X-Request-Id"].startswith("req-") and made.headers["X-Served-Precision"] == "bf16"
        assert made.headers["Content-Type"].startswith("text/event-stream") and made.text.endswith("data: [DONE]\n\n")


def test_errors_before_the_first_event_have_their_status(server: Any) -> None:
    from quantizers.errors import Overloaded

    server.engine.refuse = Overloaded("the queue is full")
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            server.openai.chat.completions.create(model="demo", messages=MESSAGES, stream=stream)
        assert caught.value.status_code == 503 and caught.value.code == "overloaded"
        assert caught.value.response.headers["Retry-After"] == "2"


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (7.01, "8"), (60.0, "60")])
def test_retry_after_is_the_queues_own_estimate_rounded_up(server: Any, seconds: float, header: str) -> None:
    from quantizers.errors import Overloaded

    server.engine.refuse = Overloaded("the queue is full", code="queue_full", retry_after_seconds=seconds)
    answer = server.http.post("/v1/completions", json={"model": "demo", "prompt": "a"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, header)


def test_prefixes_are_shared_within_a_key_and_a_salt_only(server: Any) -> None:
    """The engine shares cached prefixes between requests of one salt (tests of the engine): every pair of origins must differ in it."""
    origins = [({}, {}), ({"Authorization": "Bearer one"}, {}), ({"Authorization": "Bearer two"}, {}), ({}, {"cache_salt": "s"})]
    origins.append(({"Authorization": "Bearer one"}, {"cache_salt": "s"}))
    for headers, fields in [*origins, *origins]:
        answer = server.http.post("/v1/completions", headers=headers, json={"model": "demo", "prompt": "a", "max_tokens": 1, **fields})
        assert answer.status_code == 200
    salts = [request.cache_salt for request in server.engine.seen]
    assert salts[: len(origins)] == salts[len(origins) :] and len(set(salts)) == len(origins)
    assert not any("one" in salt or "two" in salt for salt in salts), "a key is nobody's to pass on"


def test_an_error_within_the_stream_is_its_last_event(server: Any) -> None:
    from quantizers.errors import EngineUnavailable

    server.engine.fail_after, server.engine.failure = 3, EngineUnavailable("the engine died")
    with pytest.raises(openai.APIError, match="the engine died"):
        list(server.openai.completions.create(model="demo", prompt="a", stream=True))
    raw = server.http.post("/v1/completions", json={"model": "demo", "prompt": "a", "stream": True}).text
    name, data = raw.rstrip("\n").split("\n\n")[-1].split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in raw


def test_a_fault_within_the_stream_tells_nothing_of_the_inside(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.engine.fail_after, server.engine.failure = 3, RuntimeError("a secret path")
    raw = server.http.post("/v1/completions", json={"model": "demo", "prompt": "a", "stream": True}).text
    assert "internal_error" in raw and "secret" not in raw


@pytest.mark.parametrize("count", [1, 3])
def test_one_failing_choice_ends_all(server: Any, count: int) -> None:
    from quantizers.errors import OutOfMemory

    server.engine.fail_after, server.engine.failure = 2, OutOfMemory("full")
    answer = server.http.post("/v1/completions", json={"model": "demo", "prompt": "a", "n": count})
    assert answer.status_code == 507
    server.wait_for(lambda: len(server.engine.closed) == count)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels_its_request_at_once(server: Any, n: int, stream: bool) -> None:
    import httpx2

    server.engine.token_seconds = 0.02
    body = {"model": "demo", "prompt": "a", "max_tokens": 200, "n": n, "stream": stream}
    if stream:
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            server.http.post("/v1/completions", json=body, timeout=0.2)
    server.wait_for(lambda: len(server.engine.closed) == n, seconds=1.0)


def test_a_client_that_goes_before_the_first_event_cancels_too(server: Any) -> None:
    import httpx2

    server.engine.start_seconds = 30
    with pytest.raises(httpx2.ReadTimeout):
        server.http.post("/v1/completions", json={"model": "demo", "prompt": "a", "stream": True}, timeout=0.2)
    server.wait_for(lambda: len(server.engine.closed) == 1, seconds=1.0)


def test_concurrent_requests_load_a_variant_once(server: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda _: server.http.post("/v1/completions", json={"model": "demo@fp16", "prompt": "a"}).status_code, range(6))
        )
    assert answers == [200] * 6
    assert [str(spec.key) for spec in server.engine.specs] == ["demo@fp16"]
    assert server.engine.specs[0].artifact_dir is None
