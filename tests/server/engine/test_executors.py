"""Both executors against transformers' own forward pass and generate: every architecture, ragged batches, chunks, copied blocks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from quantizers.errors import InvalidInput
from quantizers.experts import take_apart
from server.engine.decode_buckets import call_again
from server.engine.executor import Chunk, Executor, ragged_batch
from server.engine.hf_executor import BLOCK_SIZE, HfExecutor
from server.engine.native_executor import NativeExecutor

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = 20  # shorter than the contexts below
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama3-rope": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "dynamic-rope": LlamaConfig(
        **{**SIZES, "max_position_embeddings": 32}, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral-window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gpt2": GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=None),
    "phi": PhiConfig(**SIZES, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW),
}
LENGTHS = (1, 5, 16, 33, 47)  # prompts of one batch: less than, just, and more than whole blocks and than the window
ALONE = ("dynamic-rope",)


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    take_apart(model)
    for parameter in model.parameters():  # wide enough that attention matters and that the best two logits are apart
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def prompt_of(length: int) -> list[int]:
    return [(7 * length + 13 * index) % 97 for index in range(length)]


def table(sequence: int, tokens: int) -> list[int]:
    """Blocks of a sequence: scattered, and none shared with another."""
    return [(sequence * 8 + 5 * block) % 64 for block in range(-(-tokens // BLOCK_SIZE))]


def greedy(executor: Executor, lengths: tuple[int, ...], count: int, chunk: int) -> list[list[int]]:
    """`count` tokens after each prompt, all sequences in one ragged batch, prompts in pieces of at most `chunk` tokens."""
    executor.allocate(64)
    texts = [prompt_of(length) for length in lengths]
    done = [0] * len(lengths)
    tables = [[64 - 1 - (9 * index + block) for block in range(-(-(length + count) // BLOCK_SIZE))] for index, length in enumerate(lengths)]
    while any(len(text) < length + count for text, length in zip(texts, lengths, strict=True)):
        active = [index for index, length in enumerate(lengths) if len(texts[index]) < length + count]
        pieces = [texts[index][done[index] : done[index] + chunk] for index in active]
        chunks = [Chunk(piece, done[index], tables[index], len(piece) - 1) for index, piece in zip(active, pieces, strict=True)]
        logits = executor.forward(ragged_batch(chunks))
        for row, (index, piece) in enumerate(zip(active, pieces, strict=True)):
            done[index] += len(piece)
            if done[index] == len(texts[index]):
                texts[index].append(int(logits[row].argmax()))
    return [text[length:] for text, length in zip(texts, lengths, strict=True)]


def generated(model: PreTrainedModel, lengths: tuple[int, ...], count: int) -> list[list[int]]:
    return [
        model.generate(
            torch.tensor([prompt_of(length)]), attention_mask=torch.ones(1, length), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, length:].tolist()
        for length in lengths
    ]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALONE])
@pytest.mark.parametrize("chunk", [7, 64])
def test_greedy_tokens_are_those_of_generate(name: str, chunk: int) -> None:
    model = model_of(CONFIGS[name])
    expected = generated(model, LENGTHS, 12)
    assert len({tuple(tokens) for tokens in expected}) > 1, "a model that says the same to everything tests nothing"
    assert greedy(HfExecutor(model, model.config), LENGTHS, 12, chunk) == expected


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALONE])
def test_padded_decoding_gives_the_same_tokens(name: str) -> None:
    """Through the block tables, five sequences in a step of eight: what a GPU records, computed here."""
    model = model_of(CONFIGS[name])
    expected = generated(model, LENGTHS, 12)
    assert greedy(HfExecutor(model, model.config, call_again), LENGTHS, 12, 7) == expected


@pytest.mark.parametrize("name", ALONE)
def test_sequences_do_not_see_each_others_length(name: str) -> None:
    """Rotary frequencies that depend on the longest sequence of a pass: what a short one gets must not depend on who is beside it."""
    model = model_of(CONFIGS[name])
    together = greedy(HfExecutor(model, model.config), (5, 47), 6, 64)
    assert together[0] == generated(model_of(CONFIGS[name]), (5,), 6)[0]


def test_every_position_has_the_logits_of_the_plain_forward_pass() -> None:
    model = model_of(CONFIGS["gemma2"])
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt_of(length)])).logits[0] for length in LENGTHS]
    executor = HfExecutor(model, model.config)
    executor.allocate(64)
    chunks = [Chunk(prompt_of(length), 0, table(index, length), 0) for index, length in enumerate(LENGTHS)]
    found = executor.forward(ragged_batch(chunks)).split(list(LENGTHS))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_copied_block_is_the_block() -> None:
    model = model_of(CONFIGS["llama"])
    for executor in executors(model):
        executor.allocate(8)
        text = prompt_of(20)
        expected = executor.forward(ragged_batch([Chunk(text, 0, [1, 2], 19)]))
        executor.copy_block(1, 5)
        executor.copy_block(2, 6)
        executor.forward(ragged_batch([Chunk([3] * 20, 0, [1, 2], 20)]))  # others write where it was
        again = executor.forward(ragged_batch([Chunk(text[19:], 19, [5, 6], 0)]))
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_nan_of_a_block_that_is_reused_reaches_nobody() -> None:
    """A masked position takes part in products; zero times NaN would be NaN."""
    model = model_of(CONFIGS["llama"])
    executor = HfExecutor(model, model.config)
    executor.allocate(4)
    text = prompt_of(19)
    executor.forward(ragged_batch([Chunk(text[:18], 0, [0, 1], 18)]))
    clean = executor.forward(ragged_batch([Chunk(text[18:], 18, [0, 1], 0)]))
    for layer in executor._layers.values():
        layer.keys.numbers.fill_(float("nan"))
        layer.values.numbers.fill_(float("nan"))
    executor.forward(ragged_batch([Chunk(text[:18], 0, [2, 3], 18)]))
    assert torch.equal(executor.forward(ragged_batch([Chunk(text[18:], 18, [2, 3], 0)])), clean)


def executors(model: PreTrainedModel) -> list[Executor]:
    found: list[Executor] = []
    if NativeExecutor.why_not(model) is None:
        found.append(NativeExecutor(model))
    return [*found, HfExecutor(model, model.config)]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_the_native_step_gives_the_same_tokens(name: str) -> None:
    model = model_of(CONFIGS[name])
    reason = NativeExecutor.why_not(model)
    if reason is not None:
        pytest.skip(reason)
    native = NativeExecutor(model)
    assert greedy(native, LENGTHS, 12, 7) == greedy(native, LENGTHS, 12, 64) == generated(model, LENGTHS, 12)
    native.allocate(0)
    assert greedy(native, (5,), 3, 64) == generated(model, (5,), 3)


def test_bytes_are_those_of_the_cache() -> None:
    for name in ("llama", "gpt2"):
        model = model_of(CONFIGS[name])
        executor = HfExecutor(model, model.config)
        executor.allocate(10)
        held = sum(tensor.nbytes for layer in executor._layers.values() for tensor in (layer.keys, layer.values))
        assert held == 10 * executor.bytes_per_block
        executor.allocate(0)
        assert executor._layers == {}


def test_architectures_with_another_state_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(InvalidInput, match="Mamba"):
        HfExecutor(model, model.config)


def test_a_batch_of_one_sequence_is_cut_out() -> None:
    batch = ragged_batch([Chunk([1, 2, 3], 4, [7], 2), Chunk([5], 9, [8, 9], 0), Chunk([6, 6], 0, [1], 2)])
    assert batch.logits_rows.tolist() == [2, 3]
    assert (batch.tokens, batch.sequences) == (6, 3)
    alone = batch.alone(1)
    assert (alone.token_ids.tolist(), alone.positions.tolist(), alone.logits_rows.tolist()) == ([5], [9], [0])
    assert alone.query_start.tolist() == [0, 1]
    assert alone.block_tables.tolist() == [[8, 9]]
    assert all(
        array.dtype == np.int32 for array in (batch.token_ids, batch.positions, batch.query_start, batch.block_tables, batch.logits_rows)
    )


def test_the_demo_runs_natively_where_it_can(demo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.arange(100, 140)[None]).logits[0, -1:]
    for executor in executors(model):
        executor.allocate(8)
        found = executor.forward(ragged_batch([Chunk(list(range(100, 140)), 0, [3, 1, 5], 39)]))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
