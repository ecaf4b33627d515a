"""The fused step against transformers, and against itself in other company: alone, in a batch, in chunks, on other threads."""

import copy
import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from model_store.formats.safetensors import SafetensorsSource
from quantizers.errors import InvalidInput
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.sampling import Choice, Filters, choose
from quantizers.kernels.cpu.step import BLOCK_SIZE, NativeStep
from quantizers.linear import QuantizedLinear
from quantizers.methods.rtn import quantize_minifloat, quantize_nearest
from quantizers.model import load_model
from quantizers.recipe import parse_recipe
from quantizers.scheme import HEAD8, BnbScheme, IntegerScheme, MinifloatScheme
from quantizers.shared import SharedTensors
from tests.quantizers.test_native_linear import (
    available,
    restore,  # noqa: F401  after every test here too
)

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=f"native kernels are {library.missing()}")

# Two fp32 evaluations of one model in different orders of summation, relative to the largest logit.
FP32_ERROR = 2e-5
# KL of transformers' own bf16 run against fp32 on the demo's prompt is about 1e-3; ours keeps the residual stream in fp32.
BF16_KL = 2e-3
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Die Hauptstadt von Deutschland ist",
    "今日は",
    "🙂 means that",
    "SELECT name FROM",
    "Once upon a time, in a village by the sea,",
    "<html><body>",
)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 307,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama, wide heads, one key head": LlamaConfig(**SMALL | {"num_key_value_heads": 1, "head_dim": 80}),
    "llama, llama3 rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, linear rope": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama, yarn rope": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    ),
    "llama, 12 heads of one key head": LlamaConfig(
        **SMALL | {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 16}
    ),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=37, head_dim=16),
    "mistral with a window shorter than a block": MistralConfig(**SMALL, sliding_window=8, head_dim=16),
    "qwen2 with windows in some layers": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=21, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
}


def small(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    )
    for parameter_name, parameter in model.named_parameters():  # transformers starts norms at one and biases at zero
        if "norm" in parameter_name:
            parameter.uniform_(0.5, 1.5)
        elif "bias" in parameter_name:
            parameter.uniform_(-0.5, 0.5)
    return model


def quantized(model: PreTrainedModel, scheme: IntegerScheme | MinifloatScheme, head: IntegerScheme | None = None) -> PreTrainedModel:
    """The decoder's layers (and the output matrix) rounded to nearest, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or (name == "lm_head" and head is None):
            continue
        wanted = head if name == "lm_head" and head is not None else scheme
        make = quantize_minifloat if isinstance(wanted, MinifloatScheme) else quantize_nearest
        weight = make(module.weight.float(), wanted, layer=name)  # type: ignore[operator]
        layer = QuantizedLinear(
            wanted,
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            dtype=module.weight.dtype,
            device=torch.device("cpu"),
        )
        layer.load(weight)
        if module.bias is not None:
            layer.bias = module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return model


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class Cache:
    """A step and a naive allocator: sequence s owns blocks in an order that is not the order of its text."""

    def __init__(self, model: torch.nn.Module, sequences: int = 1, length: int = 256) -> None:
        self.step = NativeStep(model)
        width = -(-length // BLOCK_SIZE)
        self.step.allocate(sequences * width)
        self.step._cache.fill_(0xFF)  # NaN wherever nothing was written
        order = np.random.default_rng(0).permutation(sequences * width).astype(np.int32)
        self.tables = order.reshape(sequences, width)

    def feed(self, ids: list[int], *, start: int = 0, sequence: int = 0) -> Tensor:
        """Logits of every token."""
        count = len(ids)
        positions = np.arange(start, start + count, dtype=np.int32)
        return self.step.forward(
            ints(*ids), positions, ints(0, count), self.tables[sequence : sequence + 1], np.arange(count, dtype=np.int32)
        )


def expected(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def kl(reference: Tensor, found: Tensor) -> float:
    p, q = reference.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def text(model: PreTrainedModel, length: int, seed: int = 0) -> list[int]:
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers_in_fp32(name: str) -> None:
    model = small(name)
    ids = text(model, 150)
    reference = expected(model, ids)
    cache = Cache(model)
    whole = cache.feed(ids)
    assert (whole - reference).abs().max() < FP32_ERROR * reference.abs().max()
    assert cache.step.cache_dtype == torch.float32


ORDERS_APART = 5e-3  # sums that differ in their last bits become other numbers of bf16, of 2^-9, where they are the next product's inputs


def check_that_no_bit_changes(make: Callable[[], Cache], ids: list[int], *, bf16: bool) -> None:
    """150 tokens at once, and in pieces of several sizes by several numbers of threads and instruction sets. Products with `bf16` matrices
    are summed in another order by AMX, which then is compared with itself.
    """
    orders = [[isa for isa in available() if isa != "amx"], [isa for isa in available() if isa == "amx"]] if bf16 else [available()]
    found: list[Tensor] = []
    for isas in filter(None, orders):
        best = isas[-1]
        library.select_instruction_set(best)
        torch.set_num_threads(2)  # each takes a part of the prompt's tokens
        whole = make().feed(ids)
        for isa, threads, sizes in (
            (best, 1, (150,)),
            (best, 2, (1,) * 150),
            (best, 3, (64, 1, 37, 48)),
            (best, 7, (1,) * 5 + (145,)),  # more threads than some products have parts
            ("scalar", 2, (7, 143)),
            ("avx2", 1, (149, 1)),
        ):
            if isa not in isas:
                continue
            library.select_instruction_set(isa)
            torch.set_num_threads(threads)
            cache, start, parts = make(), 0, []
            for size in sizes:
                parts.append(cache.feed(ids[start : start + size], start=start))
                start += size
            assert torch.equal(torch.cat(parts), whole), (isa, threads, sizes)
        found.append(whole)
    assert (found[0] - found[-1]).norm() <= ORDERS_APART * found[0].norm()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_threads_and_instruction_sets_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = small(name, dtype)
    ids = text(model, 150)
    check_that_no_bit_changes(lambda: Cache(model), ids, bf16=dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "scheme",
    [
        IntegerScheme(weight_bits=4, group_size=32),
        IntegerScheme(weight_bits=8, group_size=32, zero="integer"),
        IntegerScheme(weight_bits=3, group_size=32, zero="minimum", activation_bits=8),
        MinifloatScheme(format="mxfp4"),
    ],
    ids=lambda scheme: scheme.slug,
)
def test_chunks_threads_and_instruction_sets_change_no_bit_of_quantized_weights(scheme: IntegerScheme | MinifloatScheme) -> None:
    model = small("qwen3")
    quantized(model, scheme, HEAD8)
    ids = text(model, 150)
    check_that_no_bit_changes(lambda: Cache(model), ids, bf16=False)


@pytest.mark.parametrize(
    "scheme",
    [
        None,
        IntegerScheme(weight_bits=4, group_size=32, zero="minimum"),
        IntegerScheme(weight_bits=8),
        IntegerScheme(weight_bits=8, activation_bits=8),
        IntegerScheme(weight_bits=4, group_size=32, zero="integer", activation_bits=8),
        *(MinifloatScheme(format=name) for name in ("fp8", "mxfp4", "nvfp4")),
    ],
    ids=lambda scheme: scheme.slug if scheme else "bf16",
)
@pytest.mark.parametrize("name", ["llama with biases", "qwen3"])
def test_a_row_is_the_same_alone_and_among_sixteen(name: str, scheme: IntegerScheme | MinifloatScheme | None) -> None:
    """Decode tokens and prefill chunks of sixteen sequences in one step, against each alone."""
    model = small(name, torch.bfloat16)
    if scheme is not None:
        quantized(model, scheme, HEAD8)
    torch.set_num_threads(2)
    lengths = [1 + 11 * s for s in range(16)]
    news = [1 if s % 3 else 1 + 2 * s for s in range(16)]
    together, alone = Cache(model, 16), Cache(model, 16)
    texts = [text(model, before + new, seed=s) for s, (before, new) in enumerate(zip(lengths, news, strict=True))]
    for cache in (together, alone):
        for s, ids in enumerate(texts):
            cache.feed(ids[: lengths[s]], sequence=s)
    starts = np.cumsum([0, *news]).astype(np.int32)
    flat = ints(*(token for s, ids in enumerate(texts) for token in ids[lengths[s] :]))
    positions = np.concatenate([np.arange(lengths[s], lengths[s] + news[s]) for s in range(16)]).astype(np.int32)
    last = (starts[1:] - 1).astype(np.int32)
    logits = together.step.forward(flat, positions, starts, together.tables, last)
    for s, ids in enumerate(texts):
        expected_row = alone.feed(ids[lengths[s] :], start=lengths[s], sequence=s)[-1]
        assert torch.equal(logits[s], expected_row), s


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "qwen2 with windows in some layers"])
def test_a_step_of_one_token_each_gives_every_sequence_its_own(name: str) -> None:
    """Their keys and values are asked for ahead, layer by layer, which may change nothing."""
    model = quantized(small(name, torch.bfloat16), IntegerScheme(weight_bits=4, group_size=32), HEAD8)
    lengths = [1 + 9 * s for s in range(16)]
    texts = [text(model, length + 3, seed=s) for s, length in enumerate(lengths)]
    together, alone = Cache(model, 16), Cache(model, 16)
    for cache in (together, alone):
        for s, ids in enumerate(texts):
            cache.feed(ids[: lengths[s]], sequence=s)
    torch.set_num_threads(2)
    rows = np.arange(16, dtype=np.int32)
    for step in range(3):
        tokens = ints(*(ids[length + step] for ids, length in zip(texts, lengths, strict=True)))
        logits = together.step.forward(tokens, ints(*lengths) + np.int32(step), np.arange(17, dtype=np.int32), together.tables, rows)
        for s, ids in enumerate(texts):
            assert torch.equal(logits[s], alone.feed(ids[lengths[s] + step :][:1], start=lengths[s] + step, sequence=s)[0]), (step, s)


def test_a_copied_block_continues_as_the_original() -> None:
    model = small("llama", torch.bfloat16)
    ids = text(model, 40)
    cache = Cache(model, 2)
    cache.feed(ids[:20])
    for i in range(2):
        cache.step.copy_block(int(cache.tables[0, i]), int(cache.tables[1, i]))
    assert torch.equal(cache.feed(ids[20:], start=20, sequence=1), cache.feed(ids[20:], start=20))


def test_blocks_behind_every_window_may_be_gone() -> None:
    model = small("mistral with a window")
    ids = text(model, 120)
    cache = Cache(model)
    whole = cache.feed(ids)
    cache.tables[0, :4] = -1  # positions 0..63; the window of 37 begins at 64 for token 100
    assert torch.equal(cache.feed(ids[100:], start=100), whole[100:])


def test_nan_in_one_sequence_leaves_the_others_alone() -> None:
    model = small("llama", torch.bfloat16)
    model.get_input_embeddings().weight[5] = float("nan")
    cache = Cache(model, 2)
    ids = [token for token in text(model, 30) if token != 5]
    clean = cache.feed(ids)
    both = ints(*ids, *ids[:-1], 5)
    positions = np.tile(np.arange(len(ids), dtype=np.int32), 2)
    rows = np.arange(2 * len(ids), dtype=np.int32)
    logits = cache.step.forward(both, positions, ints(0, len(ids), 2 * len(ids)), cache.tables, rows)
    assert torch.equal(logits[:-1], torch.cat((clean, clean[:-1])))
    assert logits[-1].isnan().all()


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", CONFIGS)
def test_what_lies_where_nothing_was_written_changes_no_bit(name: str, isa: str) -> None:
    library.select_instruction_set(isa)
    model = small(name, torch.bfloat16)
    ids = text(model, 75)
    found = []
    for byte in (0xFF, 0x00, 0x3F, 0xC5):  # NaN, zeros, 0.7 and -6000
        cache = Cache(model)
        cache.step._cache.fill_(byte)
        parts = [cache.feed(ids[:70]), *(cache.feed(ids[i : i + 1], start=i) for i in range(70, 73)), cache.feed(ids[73:], start=73)]
        found.append(torch.cat(parts))
    assert found[0].isfinite().all()
    assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("name", ["llama", "llama, 12 heads of one key head", "llama, wide heads, one key head"])
def test_a_token_of_nan_changes_no_row_before_it(name: str) -> None:
    """Whatever its place among the tokens that are attended to together."""
    model = small(name, torch.bfloat16)
    model.get_input_embeddings().weight[5] = float("nan")
    ids = [token if token != 5 else 6 for token in text(model, 90)]
    clean = Cache(model).feed(ids)
    assert clean.isfinite().all()
    for bad in (*range(40, 49), 64, 79, 89):
        logits = Cache(model).feed([*ids[:bad], 5, *ids[bad + 1 :]])
        assert torch.equal(logits[:bad], clean[:bad]), bad
        assert logits[bad:].isnan().all(), bad


def test_greedy_tokens_of_the_demo_are_transformers(demo: Path) -> None:
    torch.set_num_threads(1)  # torch's own threads spin, and hold each other up on a busy machine
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    cache = Cache(model)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            reference = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0
            ].tolist()
        found = list(ids)
        logits = cache.feed(ids)
        while len(found) < len(reference):
            found.append(int(logits[-1].argmax()))
            logits = cache.feed(found[-1:], start=len(found) - 1)
        assert found == reference, prompt


def test_lower_precisions_of_the_demo_stay_near_fp32(demo: Path) -> None:
    """bf16 as near as transformers' own bf16; int8 activations cost no more than their rounding."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer((Path(__file__).parent.parent.parent / "CONTRIBUTING.md").read_text())["input_ids"][:120]
    config, source = AutoConfig.from_pretrained(demo), SafetensorsSource([demo / "model.safetensors"])
    models = {
        slug: load_model(config, parse_recipe(slug), source, None, device="cpu", shared=SharedTensors(), checkpoint_key="demo").model
        for slug in ("fp32", "bf16")
    }
    reference = expected(models["fp32"], ids)
    assert kl(reference, Cache(models["bf16"]).feed(ids)) < BF16_KL
    # The demo lies on the grid of 4 bits with minimums: what is left is the rounding of activations (and bf16 elsewhere).
    lossless = quantized(models["bf16"], IntegerScheme(weight_bits=4, group_size=32, zero="minimum"), HEAD8)
    assert kl(reference, Cache(lossless).feed(ids)) < 0.01


def test_a_quantized_model_stays_near_transformers_run_of_the_same_numbers() -> None:
    model = quantized(small("qwen2 with windows in some layers", torch.bfloat16), IntegerScheme(weight_bits=4, group_size=32))
    ids = text(model, 100)
    reference = expected(model, ids)
    assert kl(reference, Cache(model).feed(ids)) < 0.01


@pytest.mark.parametrize("format_", ["fp8", "mxfp4", "nvfp4"])
def test_float_formats_stay_near_transformers_run_of_the_same_numbers(format_: str) -> None:
    """In fp32: rounding tokens to e4m3 enlarges what bf16 between the layers, which the native step does not have, would change."""
    model = quantized(small("qwen2 with windows in some layers"), MinifloatScheme(format=format_))
    assert NativeStep.supports(model) is None
    ids = text(model, 100)
    assert kl(expected(model, ids), Cache(model).feed(ids)) < 1e-3


def test_weights_are_read_in_place() -> None:
    model = small("llama", torch.bfloat16)
    cache = Cache(model)
    before = cache.feed([1, 2, 3])
    model.model.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.equal(cache.feed([1, 2, 3]), before)
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert cache.step.bytes < held / 2, "a second copy of the weights"
    assert cache.step.bytes_per_block == 2 * 2 * 2 * 16 * 16 * 2  # keys and values, layers, heads, head_dim, positions, bytes


class OtherForCausalLM(torch.nn.Module):
    pass


def test_what_cannot_run_is_said() -> None:
    with torch.device("meta"):
        gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=64, n_head=2))
    assert "GPT2LMHeadModel" in (NativeStep.supports(gpt2) or "")
    assert "OtherForCausalLM" in (NativeStep.supports(OtherForCausalLM()) or "")
    assert "float16" in (NativeStep.supports(small("llama").half()) or "")
    gelu = small("llama")
    gelu.config.hidden_act = "gelu"
    assert "gelu" in (NativeStep.supports(gelu) or "")
    odd = small("llama", torch.bfloat16)
    odd.model.layers[1].mlp.up_proj = QuantizedLinear(
        BnbScheme(format="int8"), 64, 96, bias=False, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert "int8" in (NativeStep.supports(odd) or "")
    dynamic = small("llama")
    dynamic.model.rotary_emb.rope_type = "dynamic"
    assert "dynamic" in (NativeStep.supports(dynamic) or "")
    with pytest.raises(InvalidInput, match="GPT2"):
        NativeStep(gpt2)
    assert NativeStep.supports(small("llama")) is None


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_largest_logit_of_every_row(isa: str, threads: int) -> None:
    library.select_instruction_set(isa)
    torch.set_num_threads(threads)
    model = small("llama")
    weight = model.lm_head.weight.detach().clone()
    ids = text(model, 40)

    def found(head: Tensor) -> tuple[list[int], Tensor]:
        """Of a prompt, and of one token more behind it."""
        model.lm_head.weight = torch.nn.Parameter(head)
        cache = Cache(model)
        logits = cache.feed(ids)
        largest = cache.step.largest.tolist()
        one = cache.feed([1], start=len(ids))
        return largest + cache.step.largest.tolist(), torch.cat([logits, one])

    largest, logits = found(weight.clone())
    assert largest == logits.numpy().argmax(-1).tolist()
    largest, logits = found(weight[7].repeat(len(weight), 1) * torch.tensor([-1.0] * 200 + [1.0] * (len(weight) - 200))[:, None])
    assert largest == [200 if row[-1] > 0 else 0 for row in logits], "the first of equal ones"
    for bad in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 150, len(weight) - 1):
            damaged = weight.clone()
            damaged[row] = bad
            assert found(damaged)[0] == [-1] * 41


GREEDY = Choice(Filters(0.0), (), ())


def choices_of(rounds: int) -> list[Choice]:
    """Of four sequences: greedy and drawn, with filters and without."""
    u = np.random.default_rng(1).random((3, rounds)).tolist()
    return [
        GREEDY,
        *(Choice(kept, drawn, ()) for kept, drawn in zip((Filters(1.0), Filters(0.7, top_p=0.8), Filters(1.3, top_k=20)), u, strict=True)),
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 3])
def test_rounds_are_as_many_steps(name: str, threads: int) -> None:
    """Tokens, and what is in the cache behind them, over several blocks and beyond the first rotary tables."""
    torch.set_num_threads(threads)
    model = small(name)
    rounds, starts = 40, [5, 1000, 17, 0]
    going, single = (Cache(model, sequences=4, length=1060) for _ in range(2))
    for cache in (going, single):
        for sequence, start in enumerate(starts):
            if start:
                cache.feed(text(model, start, seed=sequence), sequence=sequence)
    ids, positions, choices = ints(9, 8, 7, 6), ints(*starts), choices_of(rounds)
    found = going.step.decode(ids, positions, going.tables, choices, rounds, math.inf, ctypes.c_int32())
    rows = ints(0, 1, 2, 3)
    for index in range(rounds):
        logits = single.step.forward(ids, positions + index, ints(0, 1, 2, 3, 4), single.tables, rows)
        drawn = choose([*logits[1:]], [choice.filters for choice in choices[1:]], [choice.u[index] for choice in choices[1:]])
        ids = ints(int(single.step.largest[0]), *drawn)
        assert found[index].tolist() == ids.tolist()
    after = [cache.step.forward(ids, positions + rounds, ints(0, 1, 2, 3, 4), cache.tables, rows) for cache in (going, single)]
    assert torch.equal(*after)


def test_rounds_stop_at_an_end_at_a_wish_in_time_and_at_what_is_no_number() -> None:
    model = small("llama")
    cache = Cache(model, sequences=2)
    arguments = (ints(3, 4), ints(0, 0), cache.tables)
    tokens = cache.step.decode(*arguments, [GREEDY] * 2, 12, math.inf, ctypes.c_int32())
    assert tokens.shape == (12, 2)
    first = {int(token): index for index, token in reversed(list(enumerate(tokens[:, 1].tolist())))}
    token, at = max(first.items(), key=lambda item: item[1])
    assert at > 0, "a text that changes"
    never = next(one for one in range(307) if one not in tokens)
    ends = [GREEDY._replace(ends=(never,)), GREEDY._replace(ends=(never, token))]
    assert cache.step.decode(*arguments, ends, 12, math.inf, ctypes.c_int32()).tolist() == tokens[: at + 1].tolist()
    assert cache.step.decode(*arguments, [GREEDY] * 2, 12, math.inf, ctypes.c_int32(1)).tolist() == tokens[:1].tolist()
    assert cache.step.decode(*arguments, [GREEDY] * 2, 12, 0.0, ctypes.c_int32()).tolist() == tokens[:1].tolist()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(tokens[2, 0])] = float("nan")
    found = Cache(model, sequences=2).step.decode(*arguments, [GREEDY] * 2, 12, math.inf, ctypes.c_int32())
    assert found[-1, 0] == -1 and found[:-1].tolist() == tokens[: len(found) - 1].tolist()


def test_rounds_beyond_the_blocks_are_refused_and_write_nothing() -> None:
    step = NativeStep(small("llama"))
    step.allocate(4)
    step._cache.fill_(0x55)
    tables = np.array([[0, 1], [2, 4]], np.int32)
    for positions, message in ((ints(0, 20), "block table"), (ints(0, 5), "cache of 4 blocks"), (ints(-1, 0), "position")):
        with pytest.raises(InvalidInput, match=message):
            step.decode(ints(1, 2), positions, tables, [GREEDY] * 2, 13, math.inf, ctypes.c_int32())
    drawn = Choice(Filters(1.0), (0.5, 0.5), ())
    for choices, rounds in (([GREEDY], 3), ([GREEDY] * 2, 0), ([GREEDY, drawn], 3)):
        with pytest.raises(InvalidInput, match="rounds with"):
            step.decode(ints(1, 2), ints(0, 0), tables, choices, rounds, math.inf, ctypes.c_int32())
    assert (step._cache == 0x55).all()


GOOD: dict[str, np.ndarray] = {
    "token_ids": ints(1, 2, 3),
    "positions": ints(0, 1, 0),
    "query_start": ints(0, 2, 3),
    "block_tables": np.array([[0, 1], [2, 3]], np.int32),
    "logits_rows": ints(1, 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": ints(1, 2, 307)}, "vocabulary of 307"),
        ({"token_ids": ints(1, -1, 3)}, "vocabulary"),
        ({"positions": ints(0, 2, 0)}, "position"),
        ({"positions": ints(-1, 0, 0)}, "position"),
        ({"positions": ints(0, 1, 32)}, "block table"),
        ({"query_start": ints(0, 3, 3)}, "query_start"),
        ({"query_start": ints(1, 2, 3)}, "query_start"),
        ({"query_start": ints(0, 4, 3)}, "query_start"),
        ({"block_tables": np.array([[0, 1], [4, 3]], np.int32)}, "cache of 4 blocks"),
        ({"block_tables": np.array([[-1, 1], [2, 3]], np.int32)}, "cache of 4 blocks"),
        ({"block_tables": np.zeros((2, 0), np.int32)}, "block table"),
        ({"logits_rows": ints(3)}, "logits"),
        ({"logits_rows": ints(-1)}, "logits"),
        ({"positions": ints(0, 1)}, "2 positions"),
        ({"token_ids": ints(), "positions": ints(), "query_start": ints(0, 0, 0)}, "0 token ids"),
        ({"block_tables": ints(0, 1)}, "2"),
        ({"token_ids": np.array([1, 2, 3])}, "int64"),
    ],
)
def test_a_wrong_batch_is_refused_and_writes_nothing(change: dict[str, np.ndarray], message: str) -> None:
    step = NativeStep(small("llama"))
    step.allocate(4)
    step._cache.fill_(0x55)
    with pytest.raises(InvalidInput, match=message):
        step.forward(**GOOD | change)
    assert (step._cache == 0x55).all()
    assert step.forward(**GOOD).isfinite().all()


def test_no_cache_no_logits_and_no_use_after_close() -> None:
    step = NativeStep(small("llama"))
    with pytest.raises(InvalidInput, match="cache of 0 blocks"):
        step.forward(**GOOD)
    with pytest.raises(InvalidInput, match="at least one"):
        step.allocate(0)
    step.allocate(4)
    assert step.forward(**GOOD | {"logits_rows": ints()}).shape == (0, 307)
    with pytest.raises(InvalidInput, match="block 4"):
        step.copy_block(0, 4)
    assert step.workspace_bytes > 0 and sum(step.profile().values()) > 0
    step.close()
    step.close()
    with pytest.raises(InvalidInput, match="closed"):
        step.forward(**GOOD)
