"""Small models of several architectures with random weights, and tensor sources and sinks in memory."""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from model_store.formats.safetensors import SafetensorsSource
from quantizers.calibration import Calibration
from quantizers.experts import take_apart
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import Recipe
from quantizers.tensors import TensorSource


class MemoryTensors(dict[str, torch.Tensor]):
    """A TensorSource, and by `__setitem__` a sink."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def get(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return self[name]

    def keys(self) -> Collection[str]:  # type: ignore[override]
        return list(super().keys())


@pytest.fixture
def memory_tensors() -> type[MemoryTensors]:
    return MemoryTensors


def tiny_config(family: str) -> PretrainedConfig:
    common = {"vocab_size": 96, "max_position_embeddings": 64}
    if family == "gpt2":
        return GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    heads = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "qwen2":  # biases in attention
        return Qwen2Config(**common, **heads, tie_word_embeddings=True)
    if family in _LIKE_LLAMA:
        return _LIKE_LLAMA[family](**common, **heads, head_dim=16)
    if family == "opt":
        return OPTConfig(**common, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64)
    if family == "falcon":  # attention and MLP side by side, one normalization feeding both
        return FalconConfig(**common, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    if family == "phi3":  # one layer for q, k and v, one for gate and up
        return Phi3Config(**common, **heads, pad_token_id=0)
    if family in _MIXTURES:
        config, experts = _MIXTURES[family]
        return config(**common, **heads, **experts, num_experts_per_tok=2, pad_token_id=None)
    if family in _ONE_HEAD_COUNT:
        return _ONE_HEAD_COUNT[family](**common, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    assert family in ("llama", "llama-tied"), family
    return LlamaConfig(**common, **heads, tie_word_embeddings=family == "llama-tied")


_LIKE_LLAMA = {
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
# Experts in every block; Qwen2-MoE has one beside them that sees all tokens, Mixtral's checkpoints name everything otherwise.
_MIXTURES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2-moe": (Qwen2MoeConfig, {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 64}),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
}
_ONE_HEAD_COUNT = {"phi": PhiConfig, "gpt-neox": GPTNeoXConfig}
# Every shape of decoder that the walk is to follow; the ones of `FAMILIES` go through all tests of the loader too.
DECODERS = ("llama", "qwen2", "gpt2", *_LIKE_LLAMA, *_MIXTURES, "opt", "falcon", "phi3", *_ONE_HEAD_COUNT)
FAMILIES = ("llama", "llama-tied", "qwen2", "gpt2")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(memory_tensors: type[MemoryTensors]) -> Callable[[str], tuple[PreTrainedModel, MemoryTensors]]:
    """Family -> transformers' own model with random weights in fp32, and its checkpoint as `save_pretrained` would name it."""

    def make(family: str) -> tuple[PreTrainedModel, MemoryTensors]:
        torch.manual_seed(0)
        attention = "eager" if family == "gemma2" else "sdpa"  # its scores are capped, which sdpa cannot do
        model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation=attention).eval()
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
        return model, memory_tensors(revert_weight_conversion(model, tensors))

    return make


@pytest.fixture
def tiny_walked(tiny: Callable[[str], tuple[PreTrainedModel, MemoryTensors]]) -> Callable[[str], PreTrainedModel]:
    """Family -> the same model as a walk runs it: the experts of a mixture are apart, and each sees every token."""

    def make(family: str) -> PreTrainedModel:
        model, _ = tiny(family)
        take_apart(model, every_token=True)
        return model

    return make


@pytest.fixture(scope="session")
def demo_config(demo: Path) -> PretrainedConfig:
    return AutoConfig.from_pretrained(demo, local_files_only=True)


@pytest.fixture(scope="session")
def demo_tensors(demo: Path) -> TensorSource:
    return SafetensorsSource([demo / "model.safetensors"])


@pytest.fixture(scope="session")
def apart() -> Iterator[Executor]:
    """A process whose memory is that of the work which it is given."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield process


def calibration_tokens(samples: int = 8, length: int = 24, *, padded: bool = False) -> Calibration:
    """Random tokens of the tiny models' vocabulary; with padding the second sample ends early."""
    tokens = torch.randint(3, 90, (samples, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, length // 2 :] = 0
    return Calibration(tokens, mask, "random", "0" * 64)


class Killed(Exception):
    """What ends a run from outside."""


def killed_and_resumed(
    config: PretrainedConfig,
    checkpoint: MemoryTensors,
    recipe: Recipe,
    calibration: Calibration,
    folder: Path,
    at: Callable[[Progress], bool],
) -> tuple[MemoryTensors, list[int]]:
    """A run that is killed in a training step that is `at`, and goes on in another, ends in the numbers of one that was left alone.

    Returns what the killed one had written, and the training steps of the one that went on.
    """
    whole, untouched, rest = MemoryTensors(), MemoryTensors(), MemoryTensors()
    quantize(config, checkpoint, recipe, whole.__setitem__, calibration=calibration)

    def until(progress: Progress) -> None:
        if progress.stage == "train" and at(progress):
            raise Killed

    with pytest.raises(Killed):
        quantize(config, checkpoint, recipe, untouched.__setitem__, calibration=calibration, checkpoints=folder, progress=until)
    steps: list[Progress] = []
    quantize(config, checkpoint, recipe, rest.__setitem__, calibration=calibration, checkpoints=folder, progress=steps.append)
    assert all(torch.equal(whole[name], rest[name]) for name in whole)
    return untouched, [progress.done for progress in steps if progress.stage == "train"]
