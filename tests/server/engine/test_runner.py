"""The runner of the demo checkpoint: what it refuses, how large it makes its cache, what it says that it holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantizers.errors import CorruptData, InvalidInput, NotFound, OutOfMemory, UnknownRecipe
from server.engine.interface import Request, Sampling, VariantKey, VariantSpec
from server.engine.loading import FolderLoader, Variant, end_of_sequence
from server.engine.native_executor import NativeExecutor
from server.engine.runner import Runner

CPU = torch.device("cpu")
FP32 = VariantKey(model="demo", precision="fp32")
BLOCK = 16 * 30 * 2 * 3 * 64 * 4  # positions, layers, keys and values, heads, head_dim, bytes of fp32


@pytest.fixture(scope="module")
def reference(demo: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()


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


@pytest.mark.parametrize(
    ("room", "tokens", "blocks"),
    [
        (100_000 * BLOCK, 10, 4096),  # 65,536 tokens where there is plenty
        (6000 * BLOCK, 10, 3000),  # half of the room, for others to find some
        (600 * BLOCK, 10, 512),  # the longest sequence has 8,192 tokens
        (300 * BLOCK, 10, 300),  # all that there is
        (3 * BLOCK, 160, 10),  # what the request needs, so that the ledger says why not
        (-5, 17, 2),
    ],
)
def test_the_cache_takes_what_is_sensible(runner: Runner, room: int, tokens: int, blocks: int) -> None:
    assert runner.kv_bytes(1) == BLOCK
    assert runner.cache_blocks(room, tokens) == blocks


def test_a_cache_that_is_too_small_says_so(runner: Runner) -> None:
    runner.open_cache(4)
    try:
        runner.check_fits(request_of((1,) * 60, max_tokens=4))
        with pytest.raises(OutOfMemory, match="need 5 blocks of the KV cache, which has 4"):
            runner.check_fits(request_of((1,) * 60, max_tokens=5))
    finally:
        runner.close_cache()
    assert runner.scheduler is None
    runner.close_cache()


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


def test_bytes_are_predicted_measured_and_shared(demo: Path) -> None:
    loader = FolderLoader(CPU)
    spec = spec_of(demo, "bf16")
    predicted, loaded = loader.predict(spec), loader.load(spec)
    assert loaded.claim == predicted
    assert loaded.claim.bytes == sum(loaded.bytes_by_dtype.values())
    assert loaded.claim.shared == {f"{demo}:bf16": sum(predicted.shared.values())}
    assert loaded.runner.kv_dtype == torch.bfloat16
    assert sum(loaded.kernels.values()) == 211
    native = isinstance(loaded.runner.executor, NativeExecutor)
    assert set(loaded.kernels) == {"native-step/dense" if native else "torch"}
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
