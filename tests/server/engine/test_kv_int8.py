"""The cache in bytes, through the engine: what is in effect is said, and nothing that a cache does changes what is generated."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.engine.decode_buckets import call_again
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.hf_executor import HfExecutor
from server.engine.interface import VariantKey, VariantSpec
from server.engine.loading import FolderLoader
from server.engine.native_executor import NativeExecutor
from server.engine.residents import Residents
from server.engine.runner import Runner, choose_executor
from server.engine.window import window_logits
from server.residency import Ledger
from tests.server.engine.test_executors import CONFIGS, LENGTHS, greedy, model_of, prompt_of, table
from tests.server.engine.test_generation import Driver, guesser, request_of, tokens_of

CPU = torch.device("cpu")
TEXTS = [tuple(range(100 + 7 * index, 100 + 7 * index + length)) for index, length in enumerate((3, 16, 21, 40, 200))]


@pytest.fixture(scope="module")
def runner(demo: Path) -> Iterator[Runner]:
    spec = VariantSpec(key=VariantKey(model="demo", precision="bf16"), checkpoint_dir=str(demo), artifact_dir=None)
    variant = FolderLoader(CPU, "int8").load(spec)
    if not isinstance(variant.runner.executor, NativeExecutor):
        pytest.skip("results are the same to the bit in the native step only")
    assert variant.runner.kv_dtype == torch.int8
    yield variant.runner
    variant.close()


def told(driver: Driver, texts: list[tuple[int, ...]] = TEXTS, **sampling: object) -> list[list[int]]:
    options = {"max_tokens": 12, "ignore_eos": True, **sampling}
    return [tokens_of(events) for events in driver.run([request_of(text, **options) for text in texts])]


def test_batches_prefixes_pieces_preemption_and_drafts_change_no_token(runner: Runner) -> None:
    alone = told(Driver(runner, sequences=1, blocks=100))
    assert len({tuple(tokens) for tokens in alone}) == len(TEXTS)
    together = Driver(runner, blocks=100)
    assert [told(together), told(together)] == [alone, alone], "the second time every prefix is found in the cache"
    assert told(Driver(runner, blocks=15, step_tokens=16, mixed_tokens=8, sequences=5)) == alone
    small = Driver(runner, blocks=9, sequences=4)
    small.scheduler._guess = 0.0
    longer = told(Driver(runner, sequences=1, blocks=100), TEXTS[:4], max_tokens=40)
    assert told(small, TEXTS[:4], max_tokens=40) == longer and small.scheduler.preemptions > 0
    drafting = Driver(runner, blocks=100)
    drafting.drafter = guesser(dict(zip(TEXTS, alone, strict=True)), seed=1)
    assert told(drafting) == alone and drafting.right > len(TEXTS)


def test_what_is_in_effect_is_said_and_takes_about_half(specs: dict[str, VariantSpec], demo: Path) -> None:
    spec = VariantSpec(key=VariantKey(model="demo", precision="bf16"), checkpoint_dir=str(demo), artifact_dir=None)
    held = {}
    for kv_dtype in ("auto", "int8"):
        residents = Residents(FolderLoader(CPU, kv_dtype), Ledger(2 << 30), CPU)
        residents.load(spec, on_ready=lambda: None)
        runner = residents.runner(spec)
        assert runner is not None
        residents.open_cache(spec.key, 4096)
        info = residents.info(spec.key)
        assert info.kv_dtype == {"auto": "bfloat16", "int8": "int8"}[kv_dtype]
        assert runner.scheduler is not None
        held[kv_dtype] = info.bytes["kv_cache"] / runner.scheduler.total_blocks
        assert held[kv_dtype] == runner.executor.bytes_per_block
        residents.unload(spec.key)
    assert held["int8"] / held["auto"] == (64 + 4) / 128


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2-window"])
def test_both_executors_and_padded_decoding_agree(name: str) -> None:
    """Any architecture: logits near those of the model's own cache, and nearer to each other."""
    model = model_of(CONFIGS[name])
    with torch.inference_mode():
        exact = torch.cat([model(torch.tensor([prompt_of(length)])).logits[0] for length in LENGTHS])
    chunks = [Chunk(prompt_of(length), 0, table(index, length), 0) for index, length in enumerate(LENGTHS)]
    found: dict[str, torch.Tensor] = {}
    executors: dict[str, Executor] = {
        "torch": HfExecutor(model, model.config, cache_dtype=torch.int8),
        "padded": HfExecutor(model, model.config, call_again, cache_dtype=torch.int8),
    }
    if NativeExecutor.why_not(model) is None:
        executors["native"] = NativeExecutor(model, cache_dtype=torch.int8)
    for kind, executor in executors.items():
        executor.allocate(64)
        found[kind] = executor.forward(ragged_batch(chunks))
        error = (found[kind] - exact).norm() / exact.norm()
        assert 0 < error < 0.05, (kind, error)
        assert (found[kind] - found["torch"]).norm() <= 0.1 * (found[kind] - exact).norm(), kind
    assert greedy(executors["padded"], LENGTHS, 6, 7) == greedy(executors["torch"], LENGTHS, 6, 7)


def test_the_demo_keeps_its_quality(demo: Path) -> None:
    """KL of the cache in bytes against the same model with its own cache, nats a token."""
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    ids = [(31 * index * index + 17 * index) % 40000 + 100 for index in range(96)]
    exact, coded = (window_logits(choose_executor(model, model.config, kv_dtype), ids).log_softmax(-1) for kv_dtype in ("auto", "int8"))
    assert 0 < (exact.exp() * (exact - coded)).sum(-1).mean().item() < 0.005
