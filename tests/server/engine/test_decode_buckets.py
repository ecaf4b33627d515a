"""Decode steps of fixed sizes: padding changes nothing, each size is recorded once, and no step asks the device for a value."""

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from quantizers.errors import InvalidInput
from quantizers.linear import QuantizedLinear
from quantizers.methods.bnb import quantize_bnb
from quantizers.scheme import BnbScheme
from server.engine.decode_buckets import SIZES, DecodeBuckets, NotRecordable, Record, call_again
from server.engine.executor import Chunk, RaggedBatch, ragged_batch
from server.engine.hf_executor import BLOCK_SIZE, HfExecutor
from server.engine.scheduler import Limits

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
CONTEXTS = (3, 16, 40)
Call = Callable[[], torch.Tensor]


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval()


def prompts() -> RaggedBatch:
    return ragged_batch([Chunk([(7 * index) % 97 for index in range(count)], 0, table(row), count) for row, count in enumerate(CONTEXTS)])


def decodes(rows: tuple[int, ...] = (0, 1, 2), after: int = 0) -> RaggedBatch:
    return ragged_batch([Chunk([5 + row], CONTEXTS[row] + after, table(row), 0) for row in rows])


def table(row: int) -> list[int]:
    return [row, 10 - row, 12 + row][: CONTEXTS[row] // BLOCK_SIZE + 1]


def started(model: PreTrainedModel, record: Record | None) -> HfExecutor:
    """With the prompts in its cache."""
    executor = HfExecutor(model, model.config, record)
    executor.allocate(16)
    executor.forward(prompts())
    return executor


class Counting:
    """A recorder that notes how often it records and replays."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, step: Call) -> Call:
        self.records += 1

        def replay() -> torch.Tensor:
            self.replays += 1
            return step()

        return replay


def test_padding_changes_neither_logits_nor_cache(model: PreTrainedModel) -> None:
    padded, plain = started(model, call_again), started(model, None)
    for rows in ((0,), (2, 1), (0, 1, 2), (1,)):
        torch.testing.assert_close(padded.forward(decodes(rows)), plain.forward(decodes(rows)), rtol=0, atol=1e-5)
    for ours, theirs in zip(padded._layers.values(), plain._layers.values(), strict=True):
        torch.testing.assert_close(ours.keys.numbers, theirs.keys.numbers, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values.numbers, theirs.values.numbers, rtol=0, atol=1e-5)


def test_what_no_sequence_wrote_reaches_nobody(model: PreTrainedModel) -> None:
    clean = started(model, call_again).forward(decodes())
    executor = HfExecutor(model, model.config, call_again)
    executor.allocate(16)
    for layer in executor._layers.values():
        layer.keys.numbers.fill_(float("nan"))
        layer.values.numbers.fill_(float("nan"))
    executor.forward(prompts())
    assert torch.equal(executor.forward(decodes()), clean)


def test_llm_int8_sees_no_new_outliers_in_the_padding(model: PreTrainedModel) -> None:
    """Its outlier columns are those of any token of the batch: padding with other tokens would change the results of real ones."""
    scheme = BnbScheme(format="int8", outlier_threshold=1.0)
    for block in model.model.layers:
        weight = quantize_bnb(block.mlp.down_proj.weight.data, scheme, layer="down_proj")
        layer = QuantizedLinear(scheme, 96, 64, bias=False, dtype=torch.float32, device=torch.device("cpu"))
        layer.load(weight)
        block.mlp.down_proj = layer
    padded, plain = started(model, call_again), started(model, None)
    torch.testing.assert_close(padded.forward(decodes()), plain.forward(decodes()), rtol=0, atol=1e-5)


def test_a_size_is_recorded_once_for_a_cache(model: PreTrainedModel) -> None:
    counting = Counting()
    executor = started(model, counting)
    assert (counting.records, counting.replays) == (0, 0), "prompts are not recorded"
    for after, rows in enumerate([(0, 1, 2), (0, 1, 2), (0, 2, 1), (1,), (1, 0), (0,)]):
        executor.forward(decodes(rows, after))
    assert (counting.records, counting.replays) == (3, 6)
    executor.allocate(16)
    executor.forward(prompts())
    executor.forward(decodes())
    assert counting.records == 4, "a recording reads the cache that it was made with"


def test_mixed_and_scored_and_large_steps_are_not_taken(model: PreTrainedModel) -> None:
    counting = Counting()
    executor = started(model, counting)
    one, two = Chunk([5], 3, table(0), 0), Chunk([1, 2], 16, table(1), 1)
    mixed = executor.forward(ragged_batch([one, two]))
    plain = started(model, None)
    torch.testing.assert_close(mixed, plain.forward(ragged_batch([one, two])), rtol=0, atol=1e-5)
    executor.forward(ragged_batch([Chunk([5], 3, table(0), 1), Chunk([6], 16, table(1), 0)]))  # a token whose logits nobody wants
    executor.forward(ragged_batch([Chunk([5], 3, [0], 0)] * (SIZES[-1] + 1)))
    assert counting.records == 0
    executor.allocate(0)
    assert not executor._buckets.takes(decodes())  # type: ignore[union-attr]


def test_every_step_of_the_scheduler_has_a_size() -> None:
    assert SIZES[-1] >= Limits().sequences
    assert all(2 * smaller >= larger for smaller, larger in itertools.pairwise(SIZES)), "at most half of a step is padding"


def test_a_model_that_cannot_be_recorded_decodes_without(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Call) -> Call:
        raise NotRecordable("operation not permitted when stream is capturing")

    executor = started(model, refuse)
    with caplog.at_level(logging.WARNING):
        found = executor.forward(decodes())
    assert "LlamaForCausalLM decodes without CUDA graphs" in caplog.text and "not permitted" in caplog.text
    torch.testing.assert_close(found, started(model, None).forward(decodes()), rtol=0, atol=1e-5)
    executor.forward(decodes(after=1))
    assert caplog.text.count("without CUDA graphs") == 1


def test_what_goes_wrong_in_the_model_is_not_taken_for_that(model: PreTrainedModel) -> None:
    def fails(step: Call) -> Call:
        raise InvalidInput("the model's own failure")

    executor = started(model, fails)
    with pytest.raises(InvalidInput, match="own failure"):
        executor.forward(decodes())


def test_no_step_asks_the_device_for_a_value(model: PreTrainedModel) -> None:
    """On the meta device tensors have shapes and no values: what would wait for a GPU fails here."""
    shapes = model.to("meta")
    for record in (None, call_again):
        executor = started(shapes, record)
        assert executor.forward(decodes()).device.type == "meta"
        mixed = ragged_batch([Chunk([5], 3, table(0), 0), Chunk([1, 2], 16, table(1), 1)])
        assert executor.forward(mixed).shape == (2, 97)
        executor.copy_block(0, 5)


def test_bytes_are_said_before(model: PreTrainedModel) -> None:
    assert HfExecutor(model, model.config).held_bytes == 0
    held = HfExecutor(model, model.config, call_again).held_bytes
    assert held == DecodeBuckets.bytes(97, 256 // BLOCK_SIZE) > sum(SIZES) * 97 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_replays_what_it_computes(model: PreTrainedModel) -> None:
    expected = started(model, None)
    executor = started(copy.deepcopy(model).to("cuda"), None)
    executor.warm_up()
    executor.allocate(16)
    executor.forward(prompts())
    for after, rows in enumerate([(0, 1, 2), (0, 1, 2), (1,), (0, 2)]):
        found: Any = executor.forward(decodes(rows, after)).cpu()
        torch.testing.assert_close(found, expected.forward(decodes(rows, after)), rtol=0, atol=1e-3)
    assert executor._buckets is not None and executor._buckets.recorded == (1, 2, 4)
