"""Mixtures of experts: apart they compute what transformers' stacks do, checkpoints find their places, routers are left alone."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GraniteMoeConfig

from quantizers.block import Block
from quantizers.blocks import decoder_blocks, linear_layers
from quantizers.errors import CorruptData, InvalidInput
from quantizers.experts import Experts, take_apart
from quantizers.flow import open_streams
from quantizers.linear import QuantizedLinear
from quantizers.model import load_model
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import IntegerScheme
from quantizers.shared import SharedTensors
from quantizers.skeleton import skeleton
from tests.quantizers.conftest import MemoryTensors, calibration_tokens

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe")


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_a_checkpoint_as_it_is_on_disk_computes_what_transformers_computes(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    assert any(".experts.3." in key for key in checkpoint.keys()), "on disk experts are apart"  # noqa: SIM118  a source of tensors
    loaded = load_model(model.config, parse_recipe("fp32"), checkpoint, None, device="cpu", shared=SharedTensors(), checkpoint_key=family)
    tokens = calibration_tokens().tokens
    assert torch.allclose(loaded.model(tokens).logits, model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("every_token", [False, True])
@torch.no_grad()
def test_experts_apart_are_the_stack(every_token: bool, tiny: Callable) -> None:
    """Views of the same weights, whether tokens are sorted to their experts or every expert computes all of them."""
    model, _ = tiny("mixtral")
    tokens = calibration_tokens().tokens
    expected = model(tokens).logits
    take_apart(model, every_token=every_token)
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)


@torch.no_grad()
def test_every_expert_sees_every_token(tiny_walked: Callable) -> None:
    """Of 192 tokens a router sends each expert about half: calibration shows it all."""
    model = tiny_walked("mixtral")
    calibration = calibration_tokens()
    streams = open_streams(model, list(decoder_blocks(model).values()), calibration.tokens, calibration.mask, frozenset(["full"]))
    name, module = next(iter(decoder_blocks(model).items()))
    block = Block(name, module, dict.fromkeys(linear_layers(module, name), IntegerScheme(weight_bits=8)), lambda *_: None, streams=streams)
    rows: dict[str, int] = {}
    block.watch(lambda group, x: rows.update({group.names[0]: rows.get(group.names[0], 0) + len(x)}))
    assert len(rows) == 2 + 1 + 4 and set(rows.values()) == {calibration.tokens.numel()}


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_left_alone(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    recipe, artifact = parse_recipe("rtn-w4g32"), MemoryTensors()
    result = quantize(model.config, checkpoint, recipe, artifact.__setitem__)
    names = [layer.name for layer in result.layers]
    assert not [name for name in names if name.endswith((".gate", "shared_expert_gate"))]
    assert len(names) == 2 * (4 + 3 * (5 if family == "qwen2-moe" else 4))
    loaded = load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key=family)
    experts = [module for module in loaded.model.modules() if isinstance(module, Experts)]
    assert len(experts) == 2 and all(isinstance(expert.up_proj, QuantizedLinear) for each in experts for expert in each)


def test_smoothing_reaches_the_router(tiny: Callable) -> None:
    """It reads the normalization that smoothing divides, so its columns take the factors, in floating point."""
    model, checkpoint = tiny("qwen3-moe")
    recipe, artifact = parse_recipe("smoothquant-w8a8"), MemoryTensors()
    result = quantize(model.config, checkpoint, recipe, artifact.__setitem__, calibration=calibration_tokens())
    changed = [name for name in result.changed if "norm" not in name and ".mlp.gate." in name]
    assert changed == [f"model.layers.{index}.mlp.gate.weight" for index in (0, 1)]


def test_stacks_of_another_kind_are_refused_by_name() -> None:
    """Interleaved, transposed and with biases: nothing here says that it is what it is not."""
    config = GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, pad_token_id=None,
    )  # fmt: skip
    model = skeleton(config, torch.float32)
    with pytest.raises(InvalidInput, match=r"mlp.experts.gate_up_proj is a weight of shape \[4, 64, 128\].*stacked experts"):
        linear_layers(next(iter(decoder_blocks(model).values())), "block")


def test_a_checkpoint_with_stacks_on_disk_is_refused_by_name() -> None:
    config = GraniteMoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    stacked = AutoModelForCausalLM.from_config(config)
    checkpoint = MemoryTensors({name: tensor.detach() for name, tensor in stacked.state_dict().items()})
    with pytest.raises(CorruptData, match=r"lacks 12 tensors.*experts.0.down_proj.weight"):
        quantize(config, checkpoint, parse_recipe("rtn-w4g32"), lambda *_: None)


@pytest.mark.parametrize("damage", ["missing", "shape", "beyond"])
def test_a_damaged_expert_is_named(damage: str, tiny: Callable) -> None:
    model, checkpoint = tiny("mixtral")
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    if damage == "missing":
        del checkpoint[key]
    elif damage == "shape":
        checkpoint[key] = torch.zeros(3, 64)
    else:
        checkpoint[key.replace(".2.", ".4.")] = torch.zeros(128, 64)
    named = {
        "missing": r"mlp\.experts\.2\.up_proj",
        "shape": r"2\.w3\.weight has the shape \[3, 64\]",
        "beyond": r"experts\.4\.w3",
    }
    with pytest.raises(CorruptData, match=named[damage]):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g32"), lambda *_: None)
