"""The loop with its real threads, ledger and loader over a tiny checkpoint: order, bounds, eviction, and failures that stay alone."""

import ctypes
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from model_store.formats.safetensors import SafetensorsSource, SafetensorsWriter
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.sampling import Choice
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from server.engine.executor import Executor, Int32, RaggedBatch
from server.engine.hf_executor import HfExecutor
from server.engine.interface import Event, Failed, Finished, Request, ResidentInfo, Sampling, Started, Token, VariantKey, VariantSpec
from server.engine.loading import FolderLoader, Variant
from server.engine.loop import Loop
from server.engine.messages import Reply, Report, RequestEvent, StepTokens
from server.engine.native_executor import NativeExecutor
from server.engine.residents import Residents
from server.engine.steps import translate
from server.residency import Claim, Ledger
from server.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
POISON, NAN = 13, 14  # token ids at which the instrumented model raises, or answers with what is not a number
PLENTY = 1 << 30
CACHE_ROOM = 150_000  # one block of 256 tokens takes 131,072 bytes at fp32, and the smallest variant more than this


class InstrumentedLoader(FolderLoader):
    """Loads the real thing, counts the loads, can hold them up, and hooks the embedding so that two token ids bring trouble."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.loads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def executor(self, model: PreTrainedModel, config: PretrainedConfig) -> Executor:
        return HfExecutor(model, config)  # the one that runs hooks

    def load(self, spec: VariantSpec) -> Variant:
        self.loads.append(spec.key.precision)
        assert self.gate.wait(30)
        variant = super().load(spec)
        variant._loaded.model.get_input_embeddings().register_forward_hook(trouble)
        variant.runner.workspace_bytes = 1000  # the true one is larger than this model
        return variant


def trouble(module: torch.nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    if (arguments[0] == POISON).any():
        raise ZeroDivisionError("the model's code is wrong")
    return output.masked_fill((arguments[0] == NAN)[..., None], float("nan"))


class NativeLoader(InstrumentedLoader):
    def executor(self, model: PreTrainedModel, config: PretrainedConfig) -> Executor:
        return FolderLoader.executor(self, model, config)


class Bench:
    """A loop and everything that it said."""

    loads_by = InstrumentedLoader

    def __init__(self, budget: int = PLENTY, max_waiting: int = 64, speculates: bool = False, twin: str | None = None) -> None:
        self.loader = self.loads_by()
        self.ledger = Ledger(budget)
        self.residents = Residents(self.loader, self.ledger, CPU)
        self.said: list[Report] = []
        self.loop = Loop(self.residents, self.said.append, max_waiting=max_waiting, speculates=speculates, twin_precision=twin)

    def submit(self, call: int, spec: VariantSpec, prompt: tuple[int, ...] = (1, 2, 3), **sampling: object) -> None:
        options = {"max_tokens": 3, "temperature": 0, **sampling}
        self.loop.submit(call, Request(id=f"r{call}", variant=spec.key, prompt_token_ids=prompt, sampling=Sampling(**options)), spec)

    def events(self, call: int) -> list[Event]:
        found: list[Event] = []
        for report in list(self.said):
            if isinstance(report, RequestEvent) and report.call == call:
                found.append(report.event)
            elif isinstance(report, StepTokens):
                found += [Token(token_id=token_id) for other, token_id in report.tokens if other == call]
        return found

    def last(self, call: int) -> Finished | Failed:
        wait_for(lambda: bool(self.events(call)) and isinstance(self.events(call)[-1], Finished | Failed))
        return self.events(call)[-1]  # type: ignore[return-value]

    def reply(self, call: int) -> Reply:
        found: list[Reply] = []
        wait_for(
            lambda: bool(found.extend(report for report in list(self.said) if isinstance(report, Reply) and report.call == call) or found)
        )
        return found[0]

    def load(self, call: int, spec: VariantSpec) -> ResidentInfo:
        self.loop.load(call, spec)
        reply = self.reply(call)
        info = reply.resident
        assert info is not None, reply.failed
        return info

    def order(self) -> list[int]:
        """Calls in the order of their last events."""
        return [report.call for report in self.said if isinstance(report, RequestEvent) and isinstance(report.event, Finished | Failed)]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@contextmanager
def running(bench: Bench) -> Iterator[Bench]:
    threads = [threading.Thread(target=bench.loop.run), threading.Thread(target=bench.loop.run_loads)]
    for thread in threads:
        thread.start()
    try:
        yield bench
    finally:
        bench.loader.gate.set()
        bench.loop.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_requests_finish_in_order_of_arrival(specs: dict[str, VariantSpec]) -> None:
    bench = Bench()
    for call in range(1, 7):
        bench.submit(call, specs["fp32" if call % 2 else "bf16"])
    with running(bench):
        for call in range(1, 7):
            assert isinstance(bench.last(call), Finished)
        # Of one variant: by arrival. Between two, a load may let the other go first.
        assert [call for call in bench.order() if call % 2] == [1, 3, 5]
        assert [call for call in bench.order() if not call % 2] == [2, 4, 6]
        bench.said.clear()
        for call in range(10, 16):
            bench.submit(call, specs["fp32" if call % 2 else "bf16"])
        bench.last(15)
        bench.last(14)
        assert [call for call in bench.order() if call % 2] == [11, 13, 15]
        assert [call for call in bench.order() if not call % 2] == [10, 12, 14]
        assert [type(event) for event in bench.events(10)] == [Started, Token, Token, Token, Finished]


def test_plain_tokens_of_a_step_are_told_together_and_in_their_place(specs: dict[str, VariantSpec]) -> None:
    """Four requests in the same steps, of which the second is told log-probabilities and the third ends early."""
    bench = Bench()
    options: dict[int, dict[str, object]] = {1: {}, 2: {"logprobs": 0}, 3: {"max_tokens": 3}, 4: {}}
    for call, own in options.items():
        bench.submit(call, specs["fp32"], prompt=(call,), **{"max_tokens": 5, **own})
    with running(bench):
        assert [bench.last(call).completion_tokens for call in options] == [5, 5, 3, 5]  # type: ignore[union-attr]
    for call, own in options.items():
        kinds = [type(event) for event in bench.events(call)]
        assert kinds == [Started, *[Token] * int(own.get("max_tokens", 5)), Finished]  # type: ignore[call-overload]
    together = [[call for call, _ in report.tokens] for report in bench.said if isinstance(report, StepTokens)]
    assert sum(map(len, together)) == 5 + 3 + 5, "those with log-probabilities go by themselves"
    assert [1] in together and [3, 4] in together, "one with log-probabilities is not overtaken by what follows it"


def test_the_queue_is_bounded(specs: dict[str, VariantSpec]) -> None:
    bench = Bench(max_waiting=2)
    for call in (1, 2, 3):
        bench.submit(call, specs["fp32"])
    failed = bench.last(3)
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.code) == ("Overloaded", "queue_full")
    assert bench.loop.stats().waiting == {"tiny@fp32": 2}
    with running(bench):
        assert isinstance(bench.last(2), Finished)
        bench.submit(4, specs["fp32"])
        assert isinstance(bench.last(4), Finished)


def test_loads_of_one_variant_are_one(specs: dict[str, VariantSpec]) -> None:
    bench = Bench()
    bench.loader.gate.clear()
    with running(bench):
        for call in (1, 2, 3):
            bench.loop.load(call, specs["fp32"])
            bench.submit(10 + call, specs["fp32"])
        bench.loader.gate.set()
        infos = [bench.reply(call).resident for call in (1, 2, 3)]
        assert infos[0] is not None
        assert infos == [infos[0]] * 3
        assert [type(bench.last(10 + call)) for call in (1, 2, 3)] == [Finished] * 3
        assert bench.loader.loads == ["fp32"]
        assert infos[0].predicted_bytes == sum(infos[0].bytes.values()) == sum(infos[0].bytes_by_dtype.values())


def test_one_variant_generates_while_another_loads(specs: dict[str, VariantSpec]) -> None:
    with running(Bench()) as bench:
        bench.load(1, specs["fp32"])
        bench.loader.gate.clear()
        bench.submit(2, specs["bf16"])
        bench.submit(3, specs["fp32"])
        assert isinstance(bench.last(3), Finished)
        assert bench.events(2) == []
        bench.loader.gate.set()
        assert isinstance(bench.last(2), Finished)


def one_variant(bench: Bench, spec: VariantSpec) -> int:
    return bench.loader.predict(spec).bytes


def test_variants_that_do_not_fit_together_take_turns(specs: dict[str, VariantSpec]) -> None:
    """Alternating requests under a budget that holds any one variant and its cache: all are answered, each from its own weights."""
    budget = one_variant(Bench(), specs["fp32"]) + CACHE_ROOM
    assert one_variant(Bench(), specs["bf16"]) > CACHE_ROOM
    with running(Bench(budget)) as bench:
        names = list(specs)
        for call in range(1, 13):
            bench.submit(call, specs[names[call % 3]])
        for call in range(1, 13):
            assert isinstance(bench.last(call), Finished), bench.last(call)
            assert bench.ledger.reserved <= budget
        assert len(bench.events(1)) == 5
        stats = bench.loop.stats()
        assert sum(stats.evictions.values()) == len(bench.loader.loads) - len(stats.memory.residents) > 0
        assert stats.memory.reserved_bytes == sum(sum(resident.bytes.values()) for resident in stats.memory.residents)


def test_a_running_variant_is_not_evicted(specs: dict[str, VariantSpec]) -> None:
    budget = one_variant(Bench(), specs["fp32"]) + CACHE_ROOM
    with running(Bench(budget)) as bench:
        bench.load(1, specs["fp32"])
        bench.submit(2, specs["fp32"], max_tokens=250)
        wait_for(lambda: len(bench.events(2)) > 3)
        bench.submit(3, specs["bf16"])
        wait_for(lambda: bench.residents.blocked)
        bench.submit(4, specs["fp32"])  # must not overtake, or a busy variant would keep the others out for ever
        assert isinstance(bench.last(3), Finished)
        assert len(bench.events(2)) == 252
        assert isinstance(bench.last(4), Finished)
        assert bench.order() == [2, 3, 4]


def test_what_never_fits_is_refused_with_numbers(specs: dict[str, VariantSpec]) -> None:
    with running(Bench(budget=1000)) as bench:
        bench.submit(1, specs["fp32"])
        bench.loop.load(2, specs["bf16"])
        failed, reply = bench.last(1), bench.reply(2)
        assert isinstance(failed, Failed)
        assert (failed.kind, reply.failed and reply.failed.kind) == ("OutOfMemory", "OutOfMemory")
        assert "the budget is 1000 bytes" in failed.message
        assert bench.ledger.reserved == 0
        assert bench.loader.loads == []


def test_a_cache_that_outgrows_the_budget_fails_its_request_and_no_other(specs: dict[str, VariantSpec]) -> None:
    budget = one_variant(Bench(), specs["fp32"]) + CACHE_ROOM
    with running(Bench(budget)) as bench:
        bench.submit(1, specs["fp32"], prompt=(1,) * 4000)
        bench.submit(2, specs["fp32"])
        failed = bench.last(1)
        assert isinstance(failed, Failed)
        assert failed.kind == "OutOfMemory"
        assert isinstance(bench.last(2), Finished)
        wait_for(lambda: not bench.loop.stats().running)


@pytest.mark.parametrize(
    ("token", "kind", "code"), [(POISON, "PrecisError", "generation_failed"), (NAN, "PrecisError", "nonfinite_logits")]
)
def test_the_models_code_failing_fails_one_request(specs: dict[str, VariantSpec], token: int, kind: str, code: str) -> None:
    with running(Bench()) as bench:
        bench.submit(1, specs["fp32"])
        bench.submit(2, specs["fp32"], prompt=(1, token))
        bench.submit(3, specs["fp32"])
        failed = bench.last(2)
        assert isinstance(failed, Failed)
        assert (failed.kind, failed.code) == (kind, code)
        assert isinstance(bench.last(3), Finished)
        tokens = [[event.token_id for event in bench.events(call) if isinstance(event, Token)] for call in (1, 3)]
        assert tokens[0] == tokens[1]
        assert bench.loop.stats().nonfinite_logits == ({"tiny@fp32": 1} if token == NAN else {})


def test_invalid_requests_are_answered_without_their_turn(specs: dict[str, VariantSpec]) -> None:
    with running(Bench()) as bench:
        bench.submit(1, specs["fp32"], max_tokens=20_000)
        wait_for(lambda: len(bench.events(1)) > 1)
        bench.submit(2, specs["fp32"], prompt=(128,))
        failed = bench.last(2)
        assert isinstance(failed, Failed)
        assert (failed.kind, failed.param) == ("InvalidInput", "prompt")
        bench.loop.cancel(1)


def test_cancelling_wherever_a_request_is(specs: dict[str, VariantSpec]) -> None:
    with running(Bench()) as bench:
        bench.load(1, specs["fp32"])
        bench.loader.gate.clear()
        bench.submit(2, specs["fp32"], max_tokens=20_000)
        bench.submit(3, specs["fp32"], prompt=(1,) * 60_000)  # its prompt is being read
        bench.submit(4, specs["bf16"])  # waits for its load
        wait_for(lambda: len(bench.events(2)) > 2 and bench.loop.stats().running["tiny@fp32"] == 2)
        stats = bench.loop.stats()
        assert stats.waiting["tiny@bf16"] == 1
        assert 0 < stats.kv_cache_usage["tiny@fp32"] < 1
        assert stats.memory.residents[0].bytes["kv_cache"] > 0
        for call in (4, 3, 2, 99):
            bench.loop.cancel(call)
        assert [getattr(bench.last(call), "reason", None) for call in (2, 3, 4)] == ["cancelled"] * 3
        wait_for(lambda: not bench.loop.stats().running)
        assert not bench.ledger.pinned(specs["fp32"].key)
        assert bench.loop.stats().kv_cache_usage == {"tiny@fp32": 0.0}


@pytest.mark.parametrize("precision", ["rtn-w4g32", "rtn-w8", "rtn-w8a8", "bnb-nf4"])
def test_a_quantized_variant_runs_beside_its_baseline(specs: dict[str, VariantSpec], precision: str, tmp_path: Path) -> None:
    folder = Path(specs["bf16"].checkpoint_dir)
    with SafetensorsWriter(tmp_path / "model.safetensors") as sink:
        quantize(
            AutoConfig.from_pretrained(folder),
            SafetensorsSource([folder / "model.safetensors"]),
            parse_recipe(precision),
            sink,
            device="cpu",
        )
    key = VariantKey(model="tiny", precision=precision)
    spec = VariantSpec(key=key, checkpoint_dir=str(folder), artifact_dir=str(tmp_path))
    with running(Bench()) as bench:
        baseline, quantized = bench.load(1, specs["bf16"]), bench.load(2, spec)
        assert quantized.predicted_bytes == pytest.approx(sum(quantized.bytes.values()), rel=0.01)
        assert quantized.bytes["weights"] < baseline.bytes["weights"]
        assert quantized.bytes["shared_weights"] == baseline.bytes["shared_weights"]
        memory = bench.loop.stats().memory
        assert memory.shared_bytes == baseline.bytes["shared_weights"] == bench.loader._shared.bytes
        bench.submit(3, spec, max_tokens=10)
        assert isinstance(bench.last(3), Finished)


def test_unloading(specs: dict[str, VariantSpec]) -> None:
    with running(Bench()) as bench:
        bench.load(1, specs["fp32"])
        bench.submit(2, specs["fp32"], max_tokens=100)
        bench.loop.unload(3, specs["fp32"].key)
        assert bench.reply(3).failed is None
        assert isinstance(bench.events(2)[-1], Finished)  # it was let to end
        assert bench.ledger.reserved == 0
        bench.loop.unload(4, specs["fp32"].key)
        failed = bench.reply(4).failed
        assert failed is not None
        assert (failed.kind, failed.message) == ("NotFound", "tiny@fp32 is not resident; resident are: none")


def test_other_files_under_the_same_name_are_loaded_anew(specs: dict[str, VariantSpec], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(specs["fp32"].checkpoint_dir).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with running(Bench()) as bench:
        bench.load(1, specs["fp32"])
        other = specs["fp32"].model_copy(update={"checkpoint_dir": str(copy)})
        bench.load(2, other)
        assert bench.loader.loads == ["fp32", "fp32"]
        assert bench.residents.runner(specs["fp32"]) is None
        assert bench.residents.runner(other) is not None


def test_files_that_cannot_be_loaded_fail_those_who_asked(specs: dict[str, VariantSpec], tmp_path: Path) -> None:
    broken = specs["bf16"].model_copy(update={"checkpoint_dir": str(tmp_path)})
    with running(Bench()) as bench:
        bench.submit(1, broken)
        bench.loop.load(2, broken)
        bench.submit(3, specs["fp32"])
        failed = bench.last(1)
        assert isinstance(failed, Failed)
        assert failed.kind == "NotFound"
        assert bench.reply(2).failed is not None
        assert isinstance(bench.last(3), Finished)


def test_closing_tells_everybody(specs: dict[str, VariantSpec]) -> None:
    bench = Bench()
    with running(bench):
        bench.load(1, specs["fp32"])
        bench.submit(2, specs["fp32"], max_tokens=20_000)
        wait_for(lambda: len(bench.events(2)) > 2)
        bench.submit(3, specs["fp32"])
        bench.loop.close()
        for call in (2, 3):
            failed = bench.last(call)
            assert isinstance(failed, Failed)
            assert failed.kind == "EngineUnavailable"
        bench.submit(4, specs["fp32"])
        assert isinstance(bench.last(4), Failed)


def test_a_measurement_beyond_the_budget_gives_everything_back(specs: dict[str, VariantSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.ledger.budget = one_variant(bench, specs["fp32"]) - 1
    monkeypatch.setattr(bench.loader, "predict", lambda spec: Claim({"weights": 10}))
    with running(bench):
        bench.loop.load(1, specs["fp32"])
        failed = bench.reply(1).failed
        assert failed is not None
        assert failed.kind == "OutOfMemory"
        assert bench.ledger.reserved == 0
        assert bench.loader._shared.bytes == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_allocators_errors_become_one(error: Exception) -> None:
    assert type(translate(error, "loading x")).__name__ == "OutOfMemory"


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_speculation_changes_the_steps_and_no_token(specs: dict[str, VariantSpec], temperature: float) -> None:
    """A text that repeats itself, which is what lookup is for; beside it requests that end in a draft."""
    told = []
    for speculates in (False, True):
        with running(Bench(speculates=speculates)) as bench:
            for call in range(1, 6):
                two_words = {20: 50.0, 21: 50.0}
                options = {"max_tokens": 30 + call, "temperature": temperature, "seed": call, "logit_bias": two_words}
                bench.submit(call, specs["fp32"], prompt=(20, 21, 20, 20) * 10, **options)
            assert all(isinstance(bench.last(call), Finished) for call in range(1, 6))
            told.append([bench.events(call) for call in range(1, 6)])
            stats = bench.loop.stats()
            assert (stats.drafted.get("tiny@fp32", 0) > 0) is speculates
            assert 0 <= stats.drafted_right.get("tiny@fp32", 0) <= stats.drafted.get("tiny@fp32", 0)
    plain, guessed = told
    assert [[event for event in events if isinstance(event, Token)] for events in plain] == [
        [event for event in events if isinstance(event, Token)] for events in guessed
    ]


def cache_usage(bench: Bench, spec: VariantSpec) -> float:
    runner = bench.residents.runner(spec)
    assert runner is not None and runner.scheduler is not None
    return runner.scheduler.usage


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_twin_drafts_and_changes_no_token(specs: dict[str, VariantSpec], temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts without repetitions, so that lookup has nothing to say; the twin is the same model in fewer bits.

    It knows no logit_bias, so it also guesses tokens that make the model raise or compute what is no number, which must hurt nobody.
    """
    monkeypatch.setattr("server.engine.speculation._MARGIN", 0.0)  # it always pays: how long steps of so small a model take is chance
    told = []
    free = {POISON: -100.0, NAN: -100.0}
    for twin in (None, "bf16"):
        with running(Bench(speculates=twin is not None, twin=twin)) as bench:
            bench.load(90, specs["fp32"])
            bench.load(91, specs["bf16"])
            for call in range(1, 6):
                prompt = tuple(range(20 + call, 60 + 3 * call))
                options = {"max_tokens": 40 + call, "temperature": temperature, "seed": call, "logit_bias": free}
                bench.submit(call, specs["fp32"], prompt=prompt, **options)
            assert [bench.last(call) for call in range(1, 6) if not isinstance(bench.last(call), Finished)] == []
            told.append([[event for event in bench.events(call) if isinstance(event, Token)] for call in range(1, 6)])
            stats = bench.loop.stats()
            if twin is not None:
                wait_for(lambda: cache_usage(bench, specs["bf16"]) == 0)
                assert stats.drafted["tiny@fp32"] >= stats.drafted_right["tiny@fp32"] > 0
                wait_for(lambda: not bench.ledger.pinned(specs["bf16"].key))
    assert told[0] == told[1]


def test_a_twin_gives_way_to_requests_of_its_own_and_to_unloading(specs: dict[str, VariantSpec]) -> None:
    with running(Bench(speculates=True, twin="bf16")) as bench:
        bench.load(90, specs["fp32"])
        bench.load(91, specs["bf16"])
        bench.submit(1, specs["fp32"], prompt=tuple(range(20, 60)), max_tokens=2000, logit_bias={POISON: -100.0, NAN: -100.0})
        wait_for(lambda: bench.loop.stats().drafted.get("tiny@fp32", 0) > 0)
        bench.submit(2, specs["bf16"], max_tokens=30)
        assert isinstance(bench.last(2), Finished)
        drafted = bench.loop.stats().drafted["tiny@fp32"]
        wait_for(lambda: bench.loop.stats().drafted["tiny@fp32"] > drafted)
        bench.loop.unload(92, specs["bf16"].key)
        assert bench.reply(92).failed is None
        bench.loop.cancel(1)
        assert isinstance(bench.last(1), Finished)
        assert bench.loop.stats().kv_cache_usage == {"tiny@fp32": 0.0}


DIGITS = '{"grammars": [{"json_schema": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 4}}]}'


def text_of(bench: Bench, call: int, spec: VariantSpec) -> str:
    return Tokenizer(Path(spec.checkpoint_dir)).decode([event.token_id for event in bench.events(call) if isinstance(event, Token)])


def test_grammars_are_followed_beside_requests_without(writer: VariantSpec) -> None:
    with running(Bench()) as bench:
        for call in range(1, 7):
            options = {"grammar": DIGITS, "temperature": 1.0, "seed": call} if call % 2 else {"logit_bias": {POISON: -100, NAN: -100}}
            bench.submit(call, writer, max_tokens=300, **options)
        bench.submit(7, writer, max_tokens=1, grammar=DIGITS)
        bench.submit(8, writer, grammar='{"grammars": [{"json_schema": {"type": "objekt"}}]}')
        for call in (1, 3, 5):
            last = bench.last(call)
            assert isinstance(last, Finished) and last.reason == "stop"
            numbers = json.loads(text_of(bench, call, writer))
            assert len(numbers) <= 4 and all(type(number) is int and number <= 99 for number in numbers)
        assert [bench.last(call).reason for call in (2, 4, 6)] == ["length"] * 3  # type: ignore[union-attr]
        cut = bench.last(7)
        assert isinstance(cut, Finished) and (cut.reason, text_of(bench, 7, writer)) == ("length", "[")
        failed = bench.last(8)
        assert isinstance(failed, Failed) and (failed.kind, failed.param) == ("InvalidInput", "response_format")


def test_a_grammar_without_a_tokenizer_fails_alone(specs: dict[str, VariantSpec]) -> None:
    with running(Bench()) as bench:
        bench.submit(1, specs["fp32"], grammar=DIGITS)
        bench.submit(2, specs["fp32"])
        failed = bench.last(1)
        assert isinstance(failed, Failed) and failed.kind == "CorruptData"
        assert isinstance(bench.last(2), Finished)


class NativeBench(Bench):
    """A loop whose variants run by the native step, where the machine has it."""

    loads_by = NativeLoader

    def __init__(self, **options: bool) -> None:
        if (reason := library.missing()) is not None:
            pytest.skip(f"native kernels are {reason}")
        super().__init__(**options)  # type: ignore[arg-type]
        self.runs: list[tuple[int, int]] = []  # steps that were to be done in a row, and those that were

    def count(self, spec: VariantSpec) -> None:
        """Note what is run in a row from now on."""
        runner = self.residents.runner(spec)
        assert runner is not None and isinstance(runner.executor, NativeExecutor)
        decode = runner.executor.decode

        def counted(batch: RaggedBatch, choices: Sequence[Choice], rounds: int, interrupted: ctypes.c_int32) -> Int32:
            tokens = decode(batch, choices, rounds, interrupted)
            self.runs.append((rounds, len(tokens)))
            return tokens

        runner.executor.decode = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("speculates", [False, True])
def test_steps_in_a_row_change_no_event(specs: dict[str, VariantSpec], speculates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn requests, ends by number and by a stop token, and one whose penalties keep all beside it to single steps."""
    told = []
    for seconds in (0.0, 0.016):
        monkeypatch.setattr("server.engine.executor.AHEAD_SECONDS", seconds)
        bench = NativeBench(speculates=speculates)
        with running(bench):
            bench.load(90, specs["bf16"])
            bench.count(specs["bf16"])
            for call in range(1, 8):
                options = {"max_tokens": 20 + 9 * call, "temperature": 0.9 * (call % 2), "seed": call, "top_p": 0.9}
                if call == 4:
                    options |= {"repetition_penalty": 1.3, "max_tokens": 12}
                bench.submit(call, specs["bf16"], prompt=(call, 2, 3), stop_token_ids=(5 * call,), **options)
            assert all(isinstance(bench.last(call), Finished) for call in range(1, 8))
        told.append([bench.events(call) for call in range(1, 8)])
        assert (len(bench.runs) > 0) == (seconds > 0)
        assert any(done > 1 for _, done in bench.runs) == (seconds > 0)
    assert told[0] == told[1]


def test_who_comes_or_leaves_interrupts_steps_in_a_row(specs: dict[str, VariantSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.executor.AHEAD_SECONDS", 3600.0)
    with running(bench := NativeBench()):
        bench.load(90, specs["fp32"])
        bench.count(specs["fp32"])
        for call, other in ((1, 2), (3, 4)):
            bench.submit(call, specs["fp32"], max_tokens=60_000)
            wait_for(lambda call=call: len(bench.events(call)) > 1)  # type: ignore[misc]
            time.sleep(0.05)  # in the middle of a row that is to go on for minutes
            bench.submit(other, specs["fp32"], prompt=(7, 8), max_tokens=1)
            assert isinstance(bench.last(other), Finished)
            time.sleep(0.05)
            bench.loop.cancel(call)
            last = bench.last(call)
            assert isinstance(last, Finished) and last.reason == "cancelled" and 0 < last.completion_tokens < 60_000
            assert len([event for event in bench.events(call) if isinstance(event, Token)]) == last.completion_tokens
    assert any(rounds > 1000 for rounds, _ in bench.runs) and all(done < 59_000 for _, done in bench.runs)


def test_what_a_row_computed_is_found_by_the_next_turn(specs: dict[str, VariantSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole answer is one row of steps, with whose last token the request ends."""
    monkeypatch.setattr("server.engine.executor.AHEAD_SECONDS", 3600.0)
    with running(bench := NativeBench()):
        bench.load(90, specs["fp32"])
        bench.count(specs["fp32"])
        bench.submit(1, specs["fp32"], max_tokens=2)  # a step has been measured after it
        bench.last(1)
        bench.submit(2, specs["fp32"], prompt=(4, 5, 6), max_tokens=40)
        bench.last(2)
        assert bench.runs[-1] == (39, 39)
        answer = tuple(event.token_id for event in bench.events(2) if isinstance(event, Token))
        bench.submit(3, specs["fp32"], prompt=(4, 5, 6, *answer, 7), max_tokens=1)
        last = bench.last(3)
        assert isinstance(last, Finished) and last.cached_tokens == 32
