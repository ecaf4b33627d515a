"""Scales move into weights without changing what a block computes, in every family, and where they would, it is said."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantizers.block import Block
from quantizers.blocks import decoder_blocks, linear_layers
from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.methods.awq import output_error
from quantizers.methods.smoothquant import SmoothQuant, smoothing_scales
from quantizers.pipeline import quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import IntegerScheme
from quantizers.smoothing import maker, move_scales, shared_by_heads
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens
from tests.quantizers.test_flow import open_streams
from tests.quantizers.test_gptq import with_weights


def first_block(model: nn.Module) -> Block:
    name, module = next(iter(decoder_blocks(model).items()))
    streams = open_streams(model, frozenset(["full"]))
    return Block(
        name,
        module,
        dict.fromkeys(linear_layers(module, name), IntegerScheme(weight_bits=8, activation_bits=8)),
        lambda *_: None,
        streams=streams,
    )


def scales_for(block: Block, width: int) -> Tensor:
    return torch.logspace(-1, 1, width)[torch.randperm(width, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_moved_scales_leave_the_block_as_it_was(family: str, tiny_walked: Callable) -> None:
    """Norms with and without bias, of the kind that multiplies by 1 + weight, and the layers that make a group's input."""
    model = tiny_walked(family)
    block = first_block(model)
    hidden, before = block.run_sample()
    moved = 0
    for group in block.groups:
        if group.norm is None and maker(block, group) is None:
            continue
        weight = block.linears[group.names[0]].weight.clone()
        scales = shared_by_heads(block, group, scales_for(block, weight.shape[1]))
        move_scales(block, group, scales)
        assert torch.allclose(block.linears[group.names[0]].weight, weight * scales), "the columns of the weight carry the scales"
        moved += 1
    _, after = block.run_sample()
    assert (after - before).norm() < 1e-4 * (before - hidden).norm()
    one_or_more = {"falcon": 1, "phi": 1, "mixtral": 7, "qwen2-moe": 8, "qwen3-moe": 7, "olmoe": 7}  # a mixture's: each expert's own
    assert moved == one_or_more.get(family, 2 if family in ("gpt2", "opt", "phi3", "gpt-neox") else 4)


@torch.no_grad()
def test_heads_that_read_one_value_head_share_their_scales(tiny: Callable) -> None:
    model, _ = tiny("llama")  # four query heads of 16 channels, two value heads
    block = first_block(model)
    group = next(group for group in block.groups if group.names[0].endswith("o_proj"))
    shared = shared_by_heads(block, group, torch.arange(64.0)).view(4, 16)
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[2], shared[3])
    assert torch.equal(shared[0], torch.arange(16.0) + 8)


@torch.no_grad()
def test_a_second_reader_of_the_norm_is_noticed(tiny: Callable) -> None:
    """The failure of a mapping that misses a consumer, such as a router that reads the smoothed norm too."""
    model, _ = tiny("llama")
    module = next(iter(decoder_blocks(model).values()))
    mlp = module.mlp.forward
    module.mlp.forward = lambda x: mlp(x) + x
    block = first_block(model)
    with pytest.raises(
        QuantizationFailed, match=r"model\.layers\.0\.mlp\.gate_proj: scaling its input channels changes what the block computes"
    ):
        for group in block.groups:
            if group.norm is not None:
                move_scales(block, group, scales_for(block, 64))


def test_scales_are_the_papers() -> None:
    """Equation 4 by hand: sqrt(16) / sqrt(4) = 2 at alpha 0.5, and all of the activations' range at alpha 1."""
    activations, weights = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([4.0, 1.0, 1.0])
    assert torch.allclose(smoothing_scales(activations, weights, 0.5), torch.tensor([2.0, 1.0, 1e-5**0.5]))
    assert torch.allclose(smoothing_scales(activations, weights, 1.0), torch.tensor([16.0, 1.0, 1e-5]))


def inject_outliers(checkpoint: MemoryTensors, channels: list[int], factor: float) -> None:
    """The same function with activations that int8 cannot hold: some channels of every norm grow, the weights that read them shrink."""
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for name, grow in ((f"{prefix}.{norm}.weight", True), *((f"{prefix}.{reader}.weight", False) for reader in readers)):
                tensor = checkpoint[name] = checkpoint[name].clone()
                tensor[..., channels] = tensor[..., channels] * factor if grow else tensor[..., channels] / factor


@torch.no_grad()
def test_outliers_break_int8_and_smoothing_mends_it(tiny: Callable) -> None:
    from quantizers.model import load_model
    from quantizers.shared import SharedTensors

    model, checkpoint = tiny("llama")
    inject_outliers(checkpoint, [5, 33], 100)
    calibration = calibration_tokens(8, 24)
    expected = torch.log_softmax(model(calibration.tokens).logits, -1)
    divergence = {}
    automatic = Recipe(methods=(SmoothQuant(alpha="auto"),), scheme=IntegerScheme(weight_bits=8, activation_bits=8))
    for name, recipe in {
        **{slug: parse_recipe(slug) for slug in ("rtn-w8a8", "smoothquant-w8a8", "smoothquant-gptq-w8a8")},
        "auto": automatic,
    }.items():
        sink = MemoryTensors()
        given = None if name == "rtn-w8a8" else calibration
        quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=given)
        loaded = load_model(model.config, recipe, checkpoint, sink, device="cpu", shared=SharedTensors(), checkpoint_key="")
        ours = torch.log_softmax(loaded.model(calibration.tokens).logits.float(), -1)
        divergence[name] = (expected.exp() * (expected - ours)).sum(-1).mean().item()
    assert divergence["smoothquant-w8a8"] < 0.2 * divergence["rtn-w8a8"]
    assert divergence["smoothquant-gptq-w8a8"] < 0.2 * divergence["rtn-w8a8"]
    assert divergence["auto"] < 0.2 * divergence["rtn-w8a8"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt"])
@torch.no_grad()
def test_awq_is_nearer_than_rounding(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    calibration = calibration_tokens(8, 24)
    expected = model(calibration.tokens).logits
    errors = {}
    for slug in ("rtn-w3g32", "awq-w3g32"):
        recipe, sink = parse_recipe(slug), MemoryTensors()
        result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=None if slug[0] == "r" else calibration)
        ours = with_weights(model, result, sink, recipe)
        for name in result.changed:
            ours.get_parameter(name).copy_(sink[name])
        errors[slug] = (ours(calibration.tokens).logits - expected).norm().item()
    assert errors["awq-w3g32"] < 0.97 * errors["rtn-w3g32"]


def test_the_output_error_is_what_the_tokens_say() -> None:
    x, difference = torch.randn(50, 8), torch.randn(4, 8)
    assert output_error(difference, x.T @ x / 50) == pytest.approx(((x @ difference.T) ** 2).sum().item() / 50, rel=1e-4)


@pytest.mark.parametrize("slug", ["smoothquant-w4g64", "smoothquant-w8", "smoothquant-nf4", "awq-w8a8", "awq-int8"])
def test_formats_without_a_use_for_it_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match=slug.partition("-")[0]):
        parse_recipe(slug)


def test_a_quantizer_stands_last() -> None:
    with pytest.raises(UnsupportedScheme, match="gptq chooses the numbers itself"):
        parse_recipe("gptq-smoothquant-w8a8")
