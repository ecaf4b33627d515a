"""Blocks and linear layers are found from the module tree of any decoder, and what would be left alone in silence is refused."""

import pytest
import torch
from torch import nn

from quantizers.blocks import decoder_blocks, layer_shape, linear_layers, output_matrix
from quantizers.errors import InvalidInput
from quantizers.skeleton import skeleton
from tests.quantizers.conftest import tiny_config

LAYERS = {
    "llama": {f"{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}
PREFIX = {"llama": "model.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_layer_of_every_block_is_found(family: str) -> None:
    model = skeleton(tiny_config(family), torch.float32)
    blocks = decoder_blocks(model)
    assert list(blocks) == [f"{PREFIX[family]}.{index}" for index in range(2)]
    for name, block in blocks.items():
        assert set(linear_layers(block, name)) == {f"{name}.{layer}" for layer in LAYERS[family]}
    assert output_matrix(model) == "lm_head"


def test_gpt2s_layers_are_seen_by_their_outputs_and_inputs() -> None:
    model = skeleton(tiny_config("gpt2"), torch.float32)
    assert layer_shape(model.get_submodule("transformer.h.0.mlp.c_fc")) == (256, 64)


def test_stacked_experts_are_refused_not_skipped() -> None:
    block = nn.Module()
    block.gate = nn.Linear(8, 4)
    block.experts = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(InvalidInput, match=r"experts is a weight of shape \[4, 8, 8\]"):
        linear_layers(block, "layers.0")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no list of equal decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(4, 4)))
