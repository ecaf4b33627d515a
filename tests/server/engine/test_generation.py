"""Generation on the demo checkpoint against transformers itself, at fp32: the same greedy tokens and log-probabilities.

At every batch size, with mixed lengths, with and without prefixes found in the cache, with prompts cut into pieces and sequences pushed
out of a cache that is too small. Both executors: transformers' modeling code, and the native step where the machine has it.
"""

import ctypes
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantizers.errors import InvalidInput, PrecisError
from server.engine.blocks import BlockPool
from server.engine.executor import Decoder, Executor
from server.engine.generation import Generation
from server.engine.hf_executor import HfExecutor
from server.engine.interface import Finished, Request, Sampling, Started, Token, VariantKey, VariantSpec
from server.engine.loading import FolderLoader
from server.engine.native_executor import NativeExecutor
from server.engine.runner import Runner
from server.engine.sampler import NonFiniteLogits
from server.engine.scheduler import Limits, Scheduler
from server.engine.steps import compute

CPU = torch.device("cpu")
KEY = VariantKey(model="demo", precision="fp32")
COUNT = 8  # tokens after each prompt
Events = list[Started | Token | Finished | PrecisError]
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
    "Once upon a time, " * 40,  # 200 tokens: two pieces beside others
    "".join(f"line {number}: {number * number}\n" for number in range(40)),  # more than two, the last of them ragged
]


class Loader(FolderLoader):
    def __init__(self, kind: type[HfExecutor] | type[NativeExecutor]) -> None:
        super().__init__(CPU)
        self._kind = kind

    def executor(self, model: PreTrainedModel, config: object) -> Executor:
        if self._kind is HfExecutor:
            return HfExecutor(model, model.config)
        reason = NativeExecutor.why_not(model)
        if reason is not None:
            pytest.skip(reason)
        return NativeExecutor(model)


@pytest.fixture(scope="module")
def reference(demo: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    return [tuple(tokenizer(text).input_ids) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(reference: PreTrainedModel, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What transformers' generate adds to each prompt; the end of sequence, which is not sent, is cut off."""
    tokens = [
        reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=COUNT, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    return [found[:-1] if found[-1] == 2 else found for found in tokens]


@pytest.fixture(scope="module", params=[HfExecutor, NativeExecutor], ids=["transformers", "native"])
def runner(demo: Path, request: pytest.FixtureRequest) -> Iterator[Runner]:
    variant = Loader(request.param).load(VariantSpec(key=KEY, checkpoint_dir=str(demo), artifact_dir=None))
    yield variant.runner
    variant.close()


class Driver:
    """Steps without threads: everything that is asked for at once, until all of it has ended."""

    def __init__(self, runner: Runner, blocks: int = 500, **limits: int) -> None:
        self.runner = runner
        runner.executor.allocate(blocks)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, runner.executor.block_size, Limits(**{"scored_tokens": 300, **limits}))
        self.steps = self.right = 0
        self.drafter: Callable[[Generation], None] = lambda generation: None
        self.ahead = 0  # steps that may follow each, where nobody wants fewer tokens

    def run(self, requests: list[Request]) -> list[Events]:
        generations = {call: Generation(call, request, self.runner, 0.0) for call, request in enumerate(requests)}
        events: list[Events] = [[] for _ in requests]
        for call, generation in generations.items():
            if generation.needs_nothing:
                events[call] = [*generation.begin(), generation.finished("length")]
            else:
                self.scheduler.add(generation.sequence)
        while self.scheduler.busy:
            self.step(generations, events)
        assert self.pool.used == 0
        return events

    def step(self, generations: dict[int, Generation], events: list[Events]) -> None:
        for generation in generations.values():
            self.drafter(generation)
        running = [generations[sequence.call] for sequence in self.scheduler.running]
        plain = running and all(generation.sampler.plain for generation in running)
        step = self.scheduler.schedule(min(self.ahead, *(generation.room for generation in running)) if plain else 0)
        assert step is not None
        self.steps += 1
        for work in step.work:
            events[work.sequence.call] += generations[work.sequence.call].begin()
        for work, outcome in zip(step.work, compute(self.runner.executor, step, generations, ctypes.c_int32()), strict=True):
            told = events[work.sequence.call]
            if isinstance(outcome, PrecisError):
                told.append(outcome)
            else:
                self.scheduler.advance(work)
                samples = work.samples  # of the sequence as the step found it
                if samples:
                    told += generations[work.sequence.call].take(outcome)
                    self.scheduler.confirm(work, max(0, len(outcome) - 1))
                self.right += max(0, len(outcome) - 1)
            if told and isinstance(told[-1], Finished | PrecisError):
                self.scheduler.remove(work.sequence)


def request_of(prompt: tuple[int, ...], **sampling: object) -> Request:
    return Request(id="r", variant=KEY, prompt_token_ids=prompt, sampling=Sampling(**{"max_tokens": COUNT, "temperature": 0, **sampling}))


def tokens_of(events: Events) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def finished(events: Events) -> Finished:
    assert isinstance(events[-1], Finished), events[-1]
    assert isinstance(events[0], Started)
    return events[-1]


@pytest.mark.parametrize("size", [1, 3, 8, 16, 24])
def test_greedy_tokens_are_those_of_generate(size: int, runner: Runner, prompts: list[tuple[int, ...]], expected: list[list[int]]) -> None:
    """Batches of `size`, filled up as sequences end; the second time every prompt is found in the cache."""
    driver = Driver(runner, sequences=size, blocks=500)
    chosen = slice(None, None, 5 if size == 1 else 1)  # one at a time is slow
    for again in (False, True):
        found = driver.run([request_of(ids) for ids in prompts[chosen]])
        for ids, tokens, events in zip(prompts[chosen], expected[chosen], found, strict=True):
            last = finished(events)
            assert tokens_of(events) == tokens
            assert (last.prompt_tokens, last.completion_tokens) == (len(ids), len(tokens))
            assert last.reason == ("length" if len(tokens) == COUNT else "stop")
            # A prompt of whole blocks is known to its last token, and that one is computed anew.
            assert not again or last.cached_tokens >= (len(ids) - 1) // 16 * 16
    assert driver.scheduler.preemptions == 0


@pytest.mark.parametrize(("blocks", "step_tokens"), [(24, 16), (30, 100)])
def test_small_caches_and_budgets_change_no_token(
    blocks: int, step_tokens: int, runner: Runner, prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    """Prompts in pieces of a few tokens, and a cache that holds little more than the longest sequence: sequences are pushed out."""
    short = [index for index, ids in enumerate(prompts) if len(ids) < 60]
    wide = [index for index in range(len(prompts)) if index not in short and len(prompts[index]) + COUNT <= blocks * 16][:1]
    driver = Driver(runner, blocks=blocks, step_tokens=step_tokens, mixed_tokens=step_tokens // 2, sequences=16)
    driver.scheduler._guess = 0.0  # admission foresees nothing
    order = short[:10] + wide + short[10:]
    events = driver.run([request_of(prompts[index]) for index in order])
    for index, found in zip(order, events, strict=True):
        finished(found)
        assert tokens_of(found) == expected[index]
    assert driver.steps > COUNT + 1  # what one step for all prompts would have taken


def test_preempted_sequences_go_on_where_they_were(runner: Runner, prompts: list[tuple[int, ...]]) -> None:
    chosen = [ids for ids in prompts if len(ids) < 16][:4]
    driver = Driver(runner, blocks=9, sequences=4)
    driver.scheduler._guess = 0.0
    events = driver.run([request_of(ids, max_tokens=40, ignore_eos=True) for ids in chosen])
    assert driver.scheduler.preemptions > 0
    plenty = Driver(runner, sequences=1).run([request_of(ids, max_tokens=40, ignore_eos=True) for ids in chosen])
    assert [tokens_of(found) for found in events] == [tokens_of(found) for found in plenty]


def test_other_salts_find_nothing(runner: Runner, prompts: list[tuple[int, ...]]) -> None:
    driver = Driver(runner)
    requests = [request_of(prompts[20], max_tokens=1).model_copy(update={"cache_salt": salt}) for salt in ("a", "a", "b", "")]
    found = [finished(driver.run([request])[0]).cached_tokens for request in requests]
    assert found[0] == found[2] == found[3] == 0
    assert found[1] >= 100


def test_prompt_logprobs_are_those_of_transformers(runner: Runner, reference: PreTrainedModel, prompts: list[tuple[int, ...]]) -> None:
    """All prompts in one batch, the long ones in several pieces; none may take from the cache what it needs the logits of."""
    options = {"max_tokens": 1, "prompt_logprobs": 5, "logprobs": 5, "ignore_eos": True}
    driver = Driver(runner)
    for chosen in (prompts, prompts[15:]):
        for ids, events in zip(chosen, driver.run([request_of(ids, **options) for ids in chosen]), strict=True):
            check_logprobs(reference, ids, events)


def check_logprobs(reference: PreTrainedModel, ids: tuple[int, ...], events: Events) -> None:
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    started, token, _ = events
    assert isinstance(started, Started)
    assert isinstance(token, Token)
    assert started.prompt_logprobs is not None
    assert token.logprob is not None
    first, *rest = started.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in rest if entry is not None] == list(ids[1:])
    found = torch.tensor([entry.logprob for entry in rest if entry is not None])
    torch.testing.assert_close(found, expected[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0], rtol=0, atol=1e-4)
    tops = torch.tensor([[value for _, value in entry.top] for entry in rest if entry is not None]).reshape(-1, 5)
    torch.testing.assert_close(tops, expected[:-1].topk(5).values, rtol=0, atol=1e-4)
    assert token.logprob.logprob == pytest.approx(float(expected[-1, token.token_id]), abs=1e-4)


def test_the_end_of_sequence_ends_and_is_not_sent(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[int, ...]]
) -> None:
    driver, prompt = Driver(runner), prompts[19]
    (events,) = driver.run([request_of(prompt, max_tokens=64)])
    tokens = tokens_of(events)
    assert finished(events).reason == "stop"
    assert "Rome" in tokenizer.decode(tokens)
    assert tokenizer.eos_token_id not in tokens
    more, longer = driver.run(
        [
            request_of(prompt, max_tokens=len(tokens) + 3, ignore_eos=True),
            request_of(prompt, max_tokens=len(tokens) + 3, min_tokens=len(tokens) + 2),
        ]
    )
    assert (finished(more).reason, len(tokens_of(more))) == ("length", len(tokens) + 3)
    assert tokens_of(more)[len(tokens)] == tokenizer.eos_token_id
    assert len(tokens_of(longer)) >= len(tokens) + 2


def test_a_stop_token_ends_and_is_not_sent(runner: Runner) -> None:
    driver, prompt = Driver(runner), tuple(range(100, 110))
    (events,) = driver.run([request_of(prompt, ignore_eos=True)])
    tokens = tokens_of(events)
    (fewer,) = driver.run([request_of(prompt, stop_token_ids=(tokens[3],), ignore_eos=True)])
    first = tokens.index(tokens[3])
    assert (finished(fewer).reason, finished(fewer).completion_tokens, tokens_of(fewer)) == ("stop", first, tokens[:first])


def test_no_tokens_at_all(runner: Runner) -> None:
    nothing, scored, one = Driver(runner).run(
        [
            request_of((5, 6, 7), max_tokens=0),
            request_of((5, 6, 7), max_tokens=0, prompt_logprobs=0),
            request_of((5,), max_tokens=0, prompt_logprobs=0),
        ]
    )
    assert (len(nothing), nothing[0], finished(nothing).reason) == (2, Started(prompt_tokens=3), "length")
    for events, length in ((scored, 3), (one, 1)):
        started = events[0]
        assert isinstance(started, Started)
        assert started.prompt_logprobs is not None
        assert [entry is None for entry in started.prompt_logprobs] == [True] + [False] * (length - 1)
        assert (len(events), finished(events).reason) == (2, "length")


def test_a_seed_gives_its_text_whatever_is_beside_it(runner: Runner, prompts: list[tuple[int, ...]]) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 20, "ignore_eos": True}
    mine = request_of((100, 200), seed=5, **options)
    (alone,) = Driver(runner).run([mine])
    others = [request_of(ids, seed=index, **options) for index, ids in enumerate(prompts[:7])]
    *_, beside, other = Driver(runner).run([*others, mine, request_of((100, 200), seed=6, **options)])
    assert tokens_of(beside) == tokens_of(alone) != tokens_of(other)


def test_choices_of_one_prompt_are_those_of_each_alone(runner: Runner, prompts: list[tuple[int, ...]]) -> None:
    """The prompt is read once and its blocks are held together, which no token may show."""
    requests = [request_of(prompts[20], seed=seed, temperature=1.0, ignore_eos=True) for seed in range(4)]
    driver = Driver(runner)
    together = driver.run(requests)
    assert [finished(events).cached_tokens for events in together] == [0, *[len(prompts[20]) - 1] * 3]
    alone = [Driver(runner).run([request])[0] for request in requests]
    assert [tokens_of(events) for events in together] == [tokens_of(events) for events in alone]
    assert len({tuple(tokens_of(events)) for events in together}) == 4


def guesser(continuations: dict[tuple[int, ...], list[int]], seed: int) -> Callable[[Generation], None]:
    """Drafts of 0 to 5 tokens from what is known to follow each prompt, every fourth of them wrong."""
    choose = random.Random(seed)

    def draft(generation: Generation) -> None:
        sequence = generation.sequence
        right = continuations[tuple(sequence.tokens[: sequence.prompt_tokens])][sequence.generated :]
        length = min(choose.randint(0, 5), sequence.max_tokens - sequence.generated - 1)
        sequence.draft = [token if choose.random() < 0.75 else 7 for token in right[:length]]

    return draft


def test_drafts_change_no_greedy_token(runner: Runner, prompts: list[tuple[int, ...]], expected: list[list[int]]) -> None:
    """Right and wrong ones, in batches, with pieces of prompts beside them and sequences pushed out of a small cache."""
    for blocks, limits in ((500, {}), (30, {"step_tokens": 100, "mixed_tokens": 40, "sequences": 16})):
        chosen = [index for index, ids in enumerate(prompts) if len(ids) + COUNT <= blocks * 16]
        driver = Driver(runner, blocks=blocks, **limits)
        driver.drafter = guesser({prompts[index]: expected[index] for index in chosen}, seed=blocks)
        for index, events in zip(chosen, driver.run([request_of(prompts[index]) for index in chosen]), strict=True):
            last = finished(events)
            assert tokens_of(events) == expected[index]
            assert last.completion_tokens == len(expected[index])
        assert driver.right > len(chosen), "drafts are of use"


@pytest.mark.parametrize("ahead", [1, 4, 30])
@pytest.mark.parametrize("blocks", [500, 30])
def test_steps_ahead_change_no_greedy_token(
    ahead: int,
    blocks: int,
    runner: Runner,
    prompts: list[tuple[int, ...]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts that end by themselves among them, and a cache in which sequences push each other out."""
    monkeypatch.setattr("server.engine.executor.AHEAD_SECONDS", 3600.0)
    chosen = [index for index, ids in enumerate(prompts) if len(ids) + COUNT <= blocks * 16]
    driver = Driver(runner, blocks=blocks)
    driver.ahead = ahead
    for index, events in zip(chosen, driver.run([request_of(prompts[index]) for index in chosen]), strict=True):
        last = finished(events)
        assert (tokens_of(events), last.completion_tokens) == (expected[index], len(expected[index]))
    assert (driver.right > len(chosen)) == isinstance(runner.executor, Decoder)


def test_steps_ahead_change_no_drawn_token(runner: Runner, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.executor.AHEAD_SECONDS", 3600.0)
    kinds: list[dict[str, object]] = [{"top_p": 0.9}, {"top_k": 40, "temperature": 0.7}, {}, {"min_p": 0.05}, {"temperature": 0}]
    requests = [request_of(ids, seed=index, **{"temperature": 1.0, **kinds[index % 5]}) for index, ids in enumerate(prompts[:10])]
    driver = Driver(runner)
    single = driver.run(requests)
    steps, driver = driver.steps, Driver(runner)
    driver.ahead = 5
    assert [tokens_of(events) for events in driver.run(requests)] == [tokens_of(events) for events in single]
    assert (driver.steps < steps) == isinstance(runner.executor, Decoder)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 8, 16, 24])
@pytest.mark.parametrize("step_tokens", [512, 24], ids=["whole", "pieces"])
@pytest.mark.parametrize("blocks", [500, 24], ids=["roomy", "tight"])
@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_every_combination_gives_the_tokens_of_generate(
    size: int, step_tokens: int, blocks: int, drafts: bool, runner: Runner, prompts: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    """Batch sizes, pieces of prompts, sequences that are pushed out and drafts with each other; then once more, over found prefixes."""
    chosen = [index for index, ids in enumerate(prompts) if len(ids) + COUNT <= blocks * 16][:: 5 if size == 1 else 1]
    driver = Driver(runner, blocks=blocks, sequences=size, step_tokens=step_tokens, mixed_tokens=step_tokens // 2)
    driver.scheduler._guess = 0.0  # admission foresees nothing
    if drafts:
        driver.drafter = guesser({prompts[index]: expected[index] for index in chosen}, seed=size)
    for _ in range(2):
        for index, events in zip(chosen, driver.run([request_of(prompts[index]) for index in chosen]), strict=True):
            finished(events)
            assert tokens_of(events) == expected[index], PROMPTS[index]
    assert driver.right > 0 or not drafts or step_tokens == size
    assert driver.scheduler.preemptions > 0 or blocks > 24 or size < 16 or step_tokens < 512


def test_drafts_change_no_sampled_token_and_no_logprob(runner: Runner, prompts: list[tuple[int, ...]]) -> None:
    """The sampler draws what it would have drawn: with a seed the very same tokens, so without one the same distribution."""
    options = {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.3, "logprobs": 2, "max_tokens": 12, "ignore_eos": True}
    requests = [request_of(ids, seed=index, **options) for index, ids in enumerate(prompts[:6])]
    plain = Driver(runner).run(requests)
    driver = Driver(runner)
    driver.drafter = guesser({ids: tokens_of(events) for ids, events in zip(prompts, plain, strict=False)}, seed=1)
    guessed = driver.run(requests)
    assert [tokens_of(events) for events in guessed] == [tokens_of(events) for events in plain] and driver.right > 6
    for one, other in zip(plain, guessed, strict=True):
        for token, again in zip(one, other, strict=True):
            if isinstance(token, Token) and isinstance(again, Token) and token.logprob and again.logprob:
                assert again.logprob.logprob == pytest.approx(token.logprob.logprob, abs=1e-4)


def test_what_cannot_be_sampled_fails_alone(runner: Runner) -> None:
    good, bad = Driver(runner).run([request_of((5, 6), ignore_eos=True), request_of((5, 6), logit_bias={7: float("1e39")})])
    finished(good)
    assert isinstance(bad[-1], InvalidInput)


def test_logits_that_are_not_numbers_fail_the_request(demo: Path) -> None:
    loader = Loader(HfExecutor)
    variant = loader.load(VariantSpec(key=KEY.model_copy(update={"precision": "bf16"}), checkpoint_dir=str(demo), artifact_dir=None))
    norm = variant._loaded.model.model.norm.weight
    norm.data = torch.full_like(norm, float("nan"))
    driver = Driver(variant.runner, blocks=8)
    for events in driver.run([request_of((1, 2)), request_of((1, 2), prompt_logprobs=1, max_tokens=0)]):
        assert isinstance(events[-1], NonFiniteLogits)
    variant.close()
