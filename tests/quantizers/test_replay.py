"""Groups that are quantized one after the other see what the finished block shows, however often and in whatever chunks it is run."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from quantizers.block import Block, executed_tokens
from quantizers.blocks import decoder_blocks, linear_layers
from quantizers.flow import Group, Streams
from quantizers.methods.rtn import quantize_nearest
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens
from tests.quantizers.test_flow import open_streams
from tests.quantizers.test_gptq import with_weights

BOTH = frozenset(("full", "quantized"))
EIGHT = IntegerScheme(weight_bits=8, activation_bits=8)
FOUR = IntegerScheme(weight_bits=4, group_size=32)


def make_block(model: nn.Module, scheme: IntegerScheme, wanted: frozenset[str] = BOTH) -> tuple[Block, Streams]:
    name, module = next(iter(decoder_blocks(model).items()))
    streams = open_streams(model, wanted, padded=True)
    return Block(name, module, dict.fromkeys(linear_layers(module, name), scheme), lambda *_: None, streams=streams), streams


def inputs_of(block: Block, streams: Streams, hidden: Tensor) -> tuple[dict[Group, Tensor], Tensor]:
    """What each group is given when the block as it is now runs on `hidden`, and the block's output."""
    seen: dict[Group, list[Tensor]] = {group: [] for group in block.groups}
    layers = linear_layers(block.module, block.name)
    handles = [
        layers[group.names[0]].register_forward_pre_hook(lambda _, args, group=group: seen[group].append(args[0])) for group in block.groups
    ]
    outputs = []
    for chunk in streams.chunks:
        before = {group: len(parts) for group, parts in seen.items()}
        outputs.append(chunk.calls[0].run(block.module, hidden[chunk.samples]))
        for group, parts in seen.items():
            parts[before[group] :] = [chunk.tokens(part) for part in parts[before[group] :]]
    for handle in handles:
        handle.remove()
    return {group: torch.cat(parts) for group, parts in seen.items()}, torch.cat(outputs)


class _Rounding:
    """A method that rounds each group to nearest and keeps what it was shown."""

    def __init__(self, block: Block, wanted: frozenset[str]) -> None:
        self.block = block
        self.seen: dict[Group, list[Tensor]] = {group: [] for group in block.groups}
        self.full: dict[Group, list[Tensor]] = {group: [] for group in block.groups}
        block.quantize_in_order(wanted, self.see, self.choose)

    def see(self, group: Group, x: Tensor, full: Tensor | None) -> None:
        self.seen[group].append(x.clone())
        self.full[group] += [] if full is None else [full.clone()]

    def choose(self, group: Group) -> Mapping[str, QuantizedWeight]:
        names, scheme = self.block.members(group)
        assert isinstance(scheme, IntegerScheme)
        return {name: quantize_nearest(self.block.linears[name].weight, scheme, layer=name) for name in names}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("chunk_tokens", [24, 72])
@torch.no_grad()
def test_each_group_sees_what_the_finished_block_gives_it(
    family: str, tiny_walked: Callable, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group's input depends on the groups before it alone: one run of the quantized block, and one of the block as it was, show all."""
    monkeypatch.setattr("quantizers.flow.CHUNK_TOKENS", chunk_tokens)
    model = tiny_walked(family)
    block, streams = make_block(model, FOUR)
    assert streams.full is not None and streams.quantized is not None
    start = streams.full.clone()
    expected_full, next_full = inputs_of(block, streams, start)
    method = _Rounding(block, BOTH)
    expected, next_quantized = inputs_of(block, streams, start)
    for group in block.groups:
        assert torch.allclose(torch.cat(method.seen[group]), expected[group], atol=1e-5), group
        assert torch.allclose(torch.cat(method.full[group]), expected_full[group], atol=1e-5), group
    assert not torch.allclose(expected[block.groups[-1]], expected_full[block.groups[-1]], atol=1e-4), "the two streams differ"
    block.finish(last=False)
    assert torch.allclose(streams.full, next_full, atol=1e-5) and torch.allclose(streams.quantized, next_quantized, atol=1e-5)


@torch.no_grad()
def test_the_quantized_stream_alone(tiny: Callable) -> None:
    model, _ = tiny("llama")
    block, streams = make_block(model, FOUR, frozenset(("quantized",)))
    assert streams.quantized is not None
    start = streams.quantized.clone()
    method = _Rounding(block, frozenset(("quantized",)))
    expected, following = inputs_of(block, streams, start)
    assert all(
        torch.allclose(torch.cat(method.seen[group]), expected[group], atol=1e-5) and not method.full[group] for group in block.groups
    )
    block.finish(last=False)
    assert torch.allclose(streams.quantized, following, atol=1e-5)


@torch.no_grad()
def test_eight_bit_tokens_are_seen_as_they_are_executed_and_the_full_stream_keeps_its_own(tiny: Callable) -> None:
    model, _ = tiny("llama")
    block, streams = make_block(model, EIGHT)
    assert streams.full is not None
    start = streams.full.clone()
    expected_full, _ = inputs_of(block, streams, start)
    method = _Rounding(block, BOTH)
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (executed_tokens(args[0]),))
        for layer in linear_layers(block.module, block.name).values()
    ]
    expected, _ = inputs_of(block, streams, start)
    for handle in handles:
        handle.remove()
    for group in block.groups:
        assert torch.allclose(torch.cat(method.seen[group]), expected[group], atol=1e-5)
        assert torch.allclose(torch.cat(method.full[group]), expected_full[group], atol=1e-5)


@pytest.mark.parametrize(
    "slug", ["gptq-w4g32z", "gptq-w8g32", "awq-w4g32z", "smoothquant-w8a8", "smoothquant-gptq-w8a8", "smoothquant.alphaauto-w8a8"]
)
@torch.no_grad()
def test_chunks_change_nothing(slug: str, tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order move a weight to a neighbouring code here and there. What GPTQ compensates grows from that, so the codes of
    its first layers are compared, and of all methods what the model loses."""
    model, checkpoint = tiny("llama")
    recipe, calibration = parse_recipe(slug), calibration_tokens(16, 48, padded=True)
    exact = model(calibration.tokens, attention_mask=calibration.mask).logits
    lost, codes = [], []
    for chunk_tokens in (48, 1 << 20):
        monkeypatch.setattr("quantizers.flow.CHUNK_TOKENS", chunk_tokens)
        sink = MemoryTensors()
        result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration)
        ours = with_weights(model, result, sink, recipe)
        for name in result.changed:
            ours.get_parameter(name).copy_(sink[name])
        lost.append(float((ours(calibration.tokens, attention_mask=calibration.mask).logits - exact).norm()))
        codes.append(sink["model.layers.0.self_attn.q_proj.codes"])
    assert lost[0] == pytest.approx(lost[1], rel=0.05)
    assert (codes[0] == codes[1]).float().mean() > 0.99
