"""What a block is run on is what transformers runs it on, in every family, and layers that share an input are found by it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantizers import flow
from quantizers.block import Block
from quantizers.blocks import decoder_blocks, linear_layers
from quantizers.errors import InvalidInput, QuantizationFailed
from quantizers.flow import Call, Group, Streams, block_inputs, find_groups
from quantizers.scheme import IntegerScheme
from tests.quantizers.conftest import DECODERS, calibration_tokens

LLAMA = [(["q_proj", "k_proj", "v_proj"], "input_layernorm"), (["o_proj"], None)]
MLP_NORM = "post_attention_layernorm"
LLAMA_MLP = [(["gate_proj", "up_proj"], MLP_NORM), (["down_proj"], None)]
GEMMA = [*LLAMA, (["gate_proj", "up_proj"], "pre_feedforward_layernorm"), (["down_proj"], None)]
FOUR_EXPERTS = ("mixtral", "qwen3-moe", "olmoe")
GROUPS = {
    **{family: [*LLAMA, *LLAMA_MLP] for family in ("llama", "qwen2", "qwen3", "mistral", "gemma")},
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    "phi3": [(["qkv_proj"], "input_layernorm"), (["o_proj"], None), (["gate_up_proj"], "post_attention_layernorm"), (["down_proj"], None)],
    "gpt2": [(["c_attn"], "ln_1"), (["c_proj"], None), (["c_fc"], "ln_2"), (["c_proj"], None)],
    "opt": [(["q_proj", "k_proj", "v_proj"], "self_attn_layer_norm"), (["out_proj"], None), (["fc1"], "final_layer_norm"), (["fc2"], None)],
    "falcon": [(["query_key_value", "dense_h_to_4h"], "input_layernorm"), (["dense"], None), (["dense_4h_to_h"], None)],
    **{family: [*LLAMA, (["gate_proj", "up_proj"] * 4, MLP_NORM), *[(["down_proj"], None)] * 4] for family in FOUR_EXPERTS},
    # The experts' and the shared one's first layers, then what each of them makes.
    "qwen2-moe": [*LLAMA, (["gate_proj", "up_proj"] * 5, MLP_NORM), *[(["down_proj"], None)] * 5],
    "phi": [(["q_proj", "k_proj", "v_proj", "fc1"], "input_layernorm"), (["dense"], None), (["fc2"], None)],
    "gpt-neox": [
        *[(["query_key_value"], "input_layernorm"), (["dense"], None)],
        *[(["dense_h_to_4h"], "post_attention_layernorm"), (["dense_4h_to_h"], None)],
    ],
}
LISTS = {"gpt2": "h", "falcon": "h", "opt": "decoder.layers"}


def last(name: str) -> str:
    return name.rpartition(".")[2]


def open_streams(model: nn.Module, wanted: frozenset[str], padded: bool = False) -> Streams:
    calibration = calibration_tokens(padded=padded)
    return flow.open_streams(model, list(decoder_blocks(model).values()), calibration.tokens, calibration.mask, wanted)


@pytest.fixture(params=[1, 3, 8])
def samples_of_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the eight that there are: each alone, a last chunk that is smaller, all at once."""
    monkeypatch.setattr("quantizers.flow.CHUNK_TOKENS", request.param * 24)
    return int(request.param)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
@pytest.mark.usefixtures("samples_of_a_chunk")
def test_blocks_run_one_by_one_are_the_model(family: str, tiny: Callable, tiny_walked: Callable) -> None:
    """The output of the last block, and what transformers' own forward pass, padding mask included, gives there."""
    model, _ = tiny(family)
    calibration, seen = calibration_tokens(padded=True), []
    final = model.base_model.get_submodule(LISTS.get(family, "layers"))[-1]
    handle = final.register_forward_hook(lambda _, __, output: seen.append(output))
    model.base_model(calibration.tokens, attention_mask=calibration.mask, use_cache=False)
    handle.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    model = tiny_walked(family)
    blocks = decoder_blocks(model)
    streams = open_streams(model, frozenset(["full"]), padded=True)
    hidden = streams.full
    for index, block in enumerate(blocks.values()):
        hidden = streams.run(block, index, hidden)
    kept = calibration.mask.bool()
    assert torch.allclose(hidden[kept], expected[kept], atol=1e-5)
    assert all("forward" not in vars(block) for block in blocks.values()), "the stand-ins are gone"


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_groups_and_what_feeds_them(family: str, tiny_walked: Callable) -> None:
    model = tiny_walked(family)
    streams = open_streams(model, frozenset(["full"]))
    name, block = next(iter(decoder_blocks(model).items()))
    groups = find_groups(block, name, linear_layers(block, name), *streams.sample(0))
    assert [([last(layer) for layer in group.names], group.norm and last(group.norm)) for group in groups] == GROUPS[family]
    routers = [last(name) for group in groups for name in group.routers]
    expected = ["gate"] if family in FOUR_EXPERTS else []
    assert routers == (["gate", "shared_expert_gate"] if family == "qwen2-moe" else expected)


@torch.no_grad()
def test_padding_is_not_shown(tiny: Callable, samples_of_a_chunk: int) -> None:
    model, _ = tiny("llama")
    streams = open_streams(model, frozenset(["full"]), padded=True)
    name, module = next(iter(decoder_blocks(model).items()))
    block = Block(name, module, dict.fromkeys(linear_layers(module, name), IntegerScheme(weight_bits=8)), lambda *_: None, streams=streams)
    rows = dict.fromkeys(block.groups, 0)

    def see(group: Group, x: torch.Tensor) -> None:
        assert len(x) <= samples_of_a_chunk * 24
        rows[group] += len(x)

    block.watch(see)
    assert list(rows.values()) == [8 * 24 - 12] * 4 and block.streams.token_count == 8 * 24 - 12


class _Skipping(nn.Module):
    """A model that hands its second block something else than the first returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.base_model = self.forward

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        hidden = input_ids[..., None].float().expand(-1, -1, 4)
        return self.layers[1](self.layers[0](hidden) * 2)


def test_a_model_that_changes_what_flows_between_blocks_is_refused() -> None:
    model = _Skipping()
    tokens = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="_Skipping does not call its decoder blocks in order"):
        block_inputs(model, list(model.layers), tokens, tokens)  # type: ignore[arg-type]
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_a_layer_that_does_not_run_is_named() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    block.unused = nn.Linear(4, 4)
    block.forward = lambda hidden: block[0](hidden)
    with pytest.raises(QuantizationFailed, match=r"blocks\.0\.unused: did not run on the calibration tokens"):
        find_groups(block, "blocks.0", linear_layers(block, "blocks.0"), Call((), {}), torch.ones(1, 2, 4))
