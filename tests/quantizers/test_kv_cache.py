"""Keys and values as bytes: worked by hand, at the ends of ranges, and against the native cache, whose bytes are read back."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from quantizers.errors import InvalidInput
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.step import BLOCK_SIZE, NativeStep
from quantizers.kernels.kv_cache import Plane, quantize_heads
from tests.quantizers.test_native_linear import restore  # noqa: F401  after every test here too
from tests.quantizers.test_native_step import Cache, check_that_no_bit_changes, expected, kl, small, text

native = pytest.mark.skipif(library.missing() is not None, reason=f"native kernels are {library.missing()}")


def test_worked_by_hand() -> None:
    codes, scales = quantize_heads(torch.tensor([[0.0, 127.0, -254.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[0, 64, -127, 0], [0, 0, 0, 0]]  # 127 / 2 = 63.5 and 1 / 2 to the even one
    assert scales.tolist() == [2.0, 2.0**-126]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_cannot_be_coded_spoils_its_head_alone(bad: float) -> None:
    plane = Plane.zeros(2, 4, 2, 8, torch.int8, torch.device("cpu"))
    new = torch.randn(3, 2, 8)
    new[1, 0, 5] = bad
    plane.write(torch.tensor([1, 2, 6]), new)
    read = plane.read(torch.tensor([0, 1]), torch.float32).flatten(0, 1)
    assert read[2, 0].isnan().all() and read[2, 1].isfinite().all() and read[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()
    plane.copy(0, 1)
    assert plane.read(torch.tensor([1]), torch.float32)[0, 2, 0].isnan().all()
    plane.clear(torch.tensor([0]))
    assert not plane.read(torch.tensor([0]), torch.float32).any()


def test_an_error_is_at_most_half_a_code_and_sizes_are_what_is_said() -> None:
    new = torch.randn(20, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None, None]
    plane = Plane.zeros(5, 4, 3, 64, torch.int8, torch.device("cpu"))
    plane.write(torch.arange(20), new)
    read = plane.read(torch.arange(5), torch.float32).flatten(0, 1)
    assert ((read - new).abs() <= new.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()
    assert plane.nbytes == 20 * Plane.bytes_per_position(3, 64, torch.int8) == 20 * 3 * (64 + 4)
    other = Plane.zeros(5, 4, 3, 64, torch.bfloat16, torch.device("cpu"))
    assert other.nbytes == 20 * Plane.bytes_per_position(3, 64, torch.bfloat16) == 20 * 3 * 128


class ByteCache(Cache):
    """A native step whose cache holds bytes; 0xFF everywhere is a scale that is NaN."""

    def __init__(self, model: torch.nn.Module, sequences: int = 1, length: int = 256) -> None:
        super().__init__(model, sequences, length)
        self.step = NativeStep(model, torch.int8)
        self.step.allocate(self.tables.size)
        self.step._cache.fill_(0xFF)


CONFIGS = (
    "llama",
    "llama, wide heads, one key head",
    "llama, 12 heads of one key head",
    "mistral with a window",
    "qwen2 with windows in some layers",
    "qwen3",
)


class Rounded:
    """transformers' attention over keys and values that were rounded to bytes: the definition, without any cache."""

    def __call__(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
    ) -> object:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        key, value = (codes * scales[..., None] for codes, scales in (quantize_heads(key), quantize_heads(value)))
        return sdpa_attention_forward(module, query, key, value, mask, **options)  # type: ignore[arg-type]


@native
@pytest.mark.parametrize("name", CONFIGS)
def test_the_native_cache_computes_what_is_defined(name: str) -> None:
    """In fp32, so that nothing but the 16 bits of queries and the 14 of weights is rounded beside the cache; now and then that tips the
    rounding of a key in a later layer, which is most of the difference."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("rounded_to_bytes", Rounded())
    AttentionMaskInterface.register("rounded_to_bytes", sdpa_mask)
    model = small(name)
    ids = text(model, 150)
    plain = expected(model, ids)
    model.set_attn_implementation("rounded_to_bytes")
    reference = expected(model, ids)
    found = ByteCache(model).feed(ids)
    assert (found - reference).norm() < 0.15 * (plain - reference).norm(), "the rounding of the cache is what makes the difference"
    assert 0 < kl(plain, found) < 0.01


@native
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_threads_and_instruction_sets_change_no_bit(name: str) -> None:
    model = small(name, torch.bfloat16)
    ids = text(model, 150)
    check_that_no_bit_changes(lambda: ByteCache(model), ids, bf16=True)


@native
def test_a_row_is_the_same_alone_and_among_others() -> None:
    model = small("qwen3", torch.bfloat16)
    together, alone = ByteCache(model, 5), ByteCache(model, 5)
    texts = [text(model, 12 + 30 * s, seed=s) for s in range(5)]
    for cache in (together, alone):
        for s, ids in enumerate(texts):
            cache.feed(ids[:-1], sequence=s)
    last = np.array([ids[-1] for ids in texts], np.int32)
    positions = np.array([len(ids) - 1 for ids in texts], np.int32)
    rows = np.arange(6, dtype=np.int32)
    logits = together.step.forward(last, positions, rows, together.tables, rows[:5])
    for s, ids in enumerate(texts):
        assert torch.equal(logits[s], alone.feed(ids[-1:], start=len(ids) - 1, sequence=s)[0])


@native
def test_nan_of_one_sequence_stays_there_and_a_copied_block_is_the_block() -> None:
    model = small("llama", torch.bfloat16)
    model.get_input_embeddings().weight[5] = float("nan")
    ids = [token for token in text(model, 40) if token != 5]
    cache = ByteCache(model, 2)
    clean = cache.feed(ids)
    assert clean.isfinite().all()
    assert cache.feed([5, *ids], sequence=1).isnan().all()
    assert torch.equal(cache.feed(ids[-1:], start=len(ids) - 1), clean[-1:])
    for index in range(3):
        cache.step.copy_block(int(cache.tables[0, index]), int(cache.tables[1, index]))
    assert torch.equal(cache.feed(ids[-1:], start=len(ids) - 1, sequence=1), clean[-1:])


@native
def test_half_the_bytes_and_no_other_types() -> None:
    model = small("llama", torch.bfloat16)  # heads of 16: a scale is a quarter of the codes
    bytes_, floats = NativeStep(model, torch.int8), NativeStep(model)
    assert (bytes_.cache_dtype, floats.cache_dtype) == (torch.int8, torch.bfloat16)
    assert floats.bytes_per_block == 2 * 2 * 2 * BLOCK_SIZE * 16 * 2
    assert bytes_.bytes_per_block == 2 * 2 * 2 * BLOCK_SIZE * (16 + 4)
    with pytest.raises(InvalidInput, match="int8 are possible"):
        NativeStep(model, torch.float16)
    with pytest.raises(InvalidInput, match=r"torch\.float32 for a model of torch\.bfloat16"):
        NativeStep(model, torch.float32)
