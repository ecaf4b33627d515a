"""The runner on the demo checkpoint against transformers itself: the same greedy tokens, the same log-probabilities, at fp32."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantizers.errors import CorruptData, InvalidInput, NotFound, OutOfMemory, UnknownRecipe
from server.engine.interface import Finished, MemoryKind, Request, Sampling, Started, Token, VariantKey, VariantSpec
from server.engine.loading import FolderLoader, Variant, end_of_sequence
from server.engine.runner import PREFILL_CHUNK, Runner
from server.engine.sampler import NonFiniteLogits

CPU = torch.device("cpu")
FP32 = VariantKey(model="demo", precision="fp32")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n <",
    '#include <stdio.h>\nint main(void) {\n    printf("',
    "SELECT name, COUNT(*) FROM users WHERE",
    '{"name": "precis", "version": [1, 2,',
    "for i in range(10):\n\tprint(i",
    "Привет, как дела? Сегодня мы",
    "今天天气很好，我们",
    "日本の首都は",
    "안녕하세요, 오늘은",
    "مرحبا بك في",
    "नमस्ते, आप कैसे",
    "Γειά σου Κόσμε, τι",
    "🎉🚀 Let's celebrate! 👩‍👩‍👧‍👦 The",
    "😀",
    "e\u0301a\u0308o\u0302 combining marks, then",
    "   \n\n\t  leading white space",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    "A",
    "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, " * 200,  # 1,000 tokens: two chunks
    "".join(f"line {number}: {number * number}\n" for number in range(150)),  # more than two chunks, the last of them ragged
]


@pytest.fixture(scope="module")
def reference(demo: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo)


def spec_of(demo: Path, precision: str) -> VariantSpec:
    return VariantSpec(key=VariantKey(model="demo", precision=precision), checkpoint_dir=str(demo), artifact_dir=None)


@pytest.fixture(scope="module")
def variant(demo: Path) -> Iterator[Variant]:
    variant = FolderLoader(CPU).load(spec_of(demo, "fp32"))
    yield variant
    variant.close()


@pytest.fixture(scope="module")
def runner(variant: Variant) -> Runner:
    return variant.runner


def request_of(prompt: tuple[int, ...], **sampling: object) -> Request:
    return Request(id="r", variant=FP32, prompt_token_ids=prompt, sampling=Sampling(**{"max_tokens": 8, "temperature": 0, **sampling}))


def never() -> bool:
    return False


def ignore(kind: MemoryKind, count: int) -> None:
    """Nobody counts here."""


def events_of(runner: Runner, request: Request) -> tuple[Started, list[Token], Finished]:
    runner.check(request)
    started, *tokens, finished = runner.run(request, cancelled=never, hold=ignore)
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    return started, tokens, finished  # type: ignore[return-value]


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_greedy_tokens_are_those_of_generate(
    text: str, runner: Runner, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer(text, return_tensors="pt")
    expected = reference.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    _, tokens, finished = events_of(runner, request_of(tuple(prompt.input_ids[0].tolist()), max_tokens=12))
    if finished.reason == "stop":
        assert expected[-1] == tokenizer.eos_token_id
        expected = expected[:-1]
    assert [token.token_id for token in tokens] == expected
    assert finished.completion_tokens == len(expected)
    assert finished.prompt_tokens == prompt.input_ids.shape[1]


@pytest.mark.parametrize("text", PROMPTS, ids=range(len(PROMPTS)))
def test_prompt_logprobs_are_those_of_transformers(
    text: str, runner: Runner, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = reference(prompt).logits[0].log_softmax(-1)
    started, tokens, _ = events_of(
        runner, request_of(tuple(prompt[0].tolist()), max_tokens=1, prompt_logprobs=5, logprobs=5, ignore_eos=True)
    )
    assert started.prompt_logprobs is not None
    first, *rest = started.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in rest if entry is not None] == prompt[0, 1:].tolist()
    found = torch.tensor([entry.logprob for entry in rest if entry is not None])
    torch.testing.assert_close(found, expected[:-1].gather(1, prompt[0, 1:, None])[:, 0], rtol=0, atol=1e-4)
    tops = torch.tensor([[value for _, value in entry.top] for entry in rest if entry is not None]).reshape(-1, 5)
    torch.testing.assert_close(tops, expected[:-1].topk(5).values, rtol=0, atol=1e-4)
    assert tokens[0].logprob is not None
    assert tokens[0].logprob.logprob == pytest.approx(float(expected[-1, tokens[0].token_id]), abs=1e-4)


def test_the_end_of_sequence_ends_and_is_not_sent(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tuple(tokenizer(PROMPTS[19]).input_ids)
    _, tokens, finished = events_of(runner, request_of(prompt, max_tokens=64))
    assert finished.reason == "stop"
    assert "Rome" in tokenizer.decode([token.token_id for token in tokens])
    assert tokenizer.eos_token_id not in [token.token_id for token in tokens]
    _, more, last = events_of(runner, request_of(prompt, max_tokens=len(tokens) + 3, ignore_eos=True))
    assert (last.reason, len(more)) == ("length", len(tokens) + 3)
    assert more[len(tokens)].token_id == tokenizer.eos_token_id
    _, longer, _ = events_of(runner, request_of(prompt, max_tokens=len(tokens) + 3, min_tokens=len(tokens) + 2))
    assert len(longer) >= len(tokens) + 2


def test_a_stop_token_ends_and_is_not_sent(runner: Runner) -> None:
    prompt = tuple(range(100, 110))
    _, tokens, _ = events_of(runner, request_of(prompt, ignore_eos=True))
    stop = tokens[3].token_id
    _, fewer, finished = events_of(runner, request_of(prompt, stop_token_ids=(stop,), ignore_eos=True))
    first = [token.token_id for token in tokens].index(stop)
    assert (finished.reason, finished.completion_tokens, len(fewer)) == ("stop", first, first)


def test_no_tokens_at_all(runner: Runner) -> None:
    started, tokens, finished = events_of(runner, request_of((5, 6, 7), max_tokens=0))
    assert (started.prompt_logprobs, tokens, finished.reason) == (None, [], "length")
    started, tokens, finished = events_of(runner, request_of((5, 6, 7), max_tokens=0, prompt_logprobs=0))
    assert started.prompt_logprobs is not None
    assert [entry is None for entry in started.prompt_logprobs] == [True, False, False]
    assert (tokens, finished.reason) == ([], "length")


def test_a_seed_repeats(runner: Runner) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "ignore_eos": True}
    first = events_of(runner, request_of((100, 200), **options))[1]
    assert events_of(runner, request_of((100, 200), **options))[1] == first
    assert events_of(runner, request_of((100, 200), **{**options, "seed": 6}))[1] != first


@pytest.mark.parametrize("after", [0, 1, 2])
def test_cancelled_between_chunks_of_the_prompt(runner: Runner, after: int) -> None:
    asked = itertools.count()
    events = list(
        runner.run(request_of((5,) * (2 * PREFILL_CHUNK + 1)), cancelled=lambda: next(asked) >= after, hold=lambda kind, count: None)
    )
    assert [type(event) for event in events] == [Started, Finished]
    assert events[-1].reason == "cancelled"  # type: ignore[union-attr]
    assert next(asked) == after + 1


def test_cancelled_between_tokens(runner: Runner) -> None:
    seen: list[Token] = []
    for event in runner.run(request_of((5, 6), max_tokens=50, ignore_eos=True), cancelled=lambda: len(seen) >= 3, hold=ignore):
        if isinstance(event, Token):
            seen.append(event)
    assert isinstance(event, Finished)
    assert (event.reason, event.completion_tokens, len(seen)) == ("cancelled", 3, 3)


def test_memory_is_asked_for_before_it_is_held(runner: Runner, variant: Variant) -> None:
    held: list[tuple[MemoryKind, int]] = []
    request = request_of((5,) * 250, max_tokens=10, ignore_eos=True)
    list(runner.run(request, cancelled=never, hold=lambda kind, count: held.append((kind, count))))
    cache = [count for kind, count in held if kind == "kv_cache"]
    per_token = 30 * 2 * 3 * 64 * 4  # layers, keys and values, heads, head_dim, bytes of fp32
    assert cache == [256 * per_token, 512 * per_token]
    assert held[0][0] == "workspace"


def test_memory_that_is_refused_ends_the_sequence(runner: Runner) -> None:
    def refuse(kind: MemoryKind, count: int) -> None:
        if kind == "kv_cache" and count > 256 * 46080:
            raise OutOfMemory("no more")

    events = runner.run(request_of((5,) * 250, max_tokens=10, ignore_eos=True), cancelled=never, hold=refuse)
    seen = []
    with pytest.raises(OutOfMemory):
        for event in events:
            seen.append(event)
    assert len(seen) == 1 + 7  # 250 prompt tokens and six more fit, and the seventh token is drawn from those


@pytest.mark.parametrize(
    ("prompt", "options", "param", "code", "message"),
    [
        ((), {}, "prompt", "invalid_value", "empty"),
        ((1, 49152), {}, "prompt", "invalid_value", "49152 is outside the vocabulary: ids are 0 to 49151"),
        ((-1,), {}, "prompt", "invalid_value", "-1"),
        ((2**62,), {}, "prompt", "invalid_value", "outside"),
        ((1,) * 8192, {"max_tokens": 1}, "prompt", "context_length_exceeded", "at most 8191"),
        ((1,) * 8193, {"max_tokens": 0}, "prompt", "context_length_exceeded", "at most 8192"),
        ((1,) * 8000, {"max_tokens": 193}, "max_tokens", "context_length_exceeded", "at most 192"),
        ((1,), {"max_tokens": 2**60}, "max_tokens", "context_length_exceeded", "at most 8191"),
        ((1,), {"stop_token_ids": (49152,)}, "stop_token_ids", "invalid_value", "49152"),
        ((1,), {"logit_bias": {-5: 1.0}}, "logit_bias", "invalid_value", "-5"),
        ((1,), {"logit_bias": {5: float("nan")}}, "logit_bias", "invalid_value", "finite"),
        ((1,), {"logit_bias": {5: float("inf")}}, "logit_bias", "invalid_value", "finite"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    runner: Runner, prompt: tuple[int, ...], options: dict[str, object], param: str, code: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        runner.check(request_of(prompt, **options))
    assert (caught.value.param, caught.value.code) == (param, code)


def test_requests_at_the_limit_are_not_refused(runner: Runner) -> None:
    runner.check(request_of((1,) * 8191, max_tokens=1))
    runner.check(request_of((1,) * 8192, max_tokens=0))
    runner.check(request_of((0, 49151), max_tokens=8190))


def test_logits_that_are_not_numbers_fail_the_request(demo: Path) -> None:
    variant = FolderLoader(CPU).load(spec_of(demo, "bf16"))
    norm = variant._loaded.model.model.norm.weight
    norm.data = torch.full_like(norm, float("nan"))
    with pytest.raises(NonFiniteLogits, match="49152 of 49152"):
        list(variant.runner.run(request_of((1, 2)), cancelled=never, hold=ignore))
    with pytest.raises(NonFiniteLogits):
        list(variant.runner.run(request_of((1, 2), prompt_logprobs=1, max_tokens=0), cancelled=never, hold=ignore))
    variant.close()


def test_bytes_are_predicted_measured_and_shared(demo: Path) -> None:
    loader = FolderLoader(CPU)
    spec = spec_of(demo, "bf16")
    predicted, loaded = loader.predict(spec), loader.load(spec)
    assert loaded.claim == predicted
    assert loaded.claim.bytes == sum(loaded.bytes_by_dtype.values())
    assert loaded.claim.shared == {f"{demo}:bf16": sum(predicted.shared.values())}
    assert loaded.runner.kv_dtype == torch.bfloat16
    assert sum(loaded.kernels.values()) == 211
    loaded.close()
    loaded.close()


def test_end_of_sequence_is_what_generate_takes(demo: Path, tmp_path: Path, reference: PreTrainedModel) -> None:
    assert end_of_sequence(reference.config, demo) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert end_of_sequence(reference.config, tmp_path) == {2, 7, 9}
    for wrong in ("[]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [-1]}', '{"eos_token_id": [true]}'):
        (tmp_path / "generation_config.json").write_text(wrong)
        with pytest.raises(CorruptData):
            end_of_sequence(reference.config, tmp_path)


def test_folders_that_are_not_there_or_not_whole(demo: Path, tmp_path: Path) -> None:
    loader = FolderLoader(CPU)
    with pytest.raises(NotFound, match=r"no config\.json"):
        loader.predict(spec_of(tmp_path, "fp32"))
    with pytest.raises(UnknownRecipe):
        loader.predict(spec_of(demo, "rtn-w5"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptData, match=r"config\.json"):
        loader.predict(spec_of(tmp_path, "fp32"))
    (tmp_path / "config.json").write_bytes((demo / "config.json").read_bytes())
    with pytest.raises(NotFound, match="safetensors"):
        loader.predict(spec_of(tmp_path, "fp32"))
