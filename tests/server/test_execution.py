"""Measured is what serves: the engine's executor gives the logits that the model's own forward pass gives, in whole windows and steps."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from model_store.formats.safetensors import SafetensorsSource
from quantizers.evaluate import model_logits
from quantizers.model import LoadedModel, load_model
from quantizers.recipe import parse_recipe
from quantizers.shared import SharedTensors
from server.engine.window import STEP_TOKENS
from server.execution import ServedExecution

WINDOW = torch.randint(0, 96, (STEP_TOKENS + 37,), generator=torch.Generator().manual_seed(4))
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}


def loaded(folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """Twice the same model: an execution changes the attention of its own."""
    config, source = AutoConfig.from_pretrained(folder), SafetensorsSource([folder / "model.safetensors"])
    options = {"device": "cpu", "shared": SharedTensors(), "checkpoint_key": "tiny"}
    first, second = (load_model(config, parse_recipe("fp32"), source, None, **options) for _ in range(2))
    return first, second


@pytest.mark.parametrize(("family", "executor"), [("llama", "native-step"), ("opt", "transformers")])
def test_windows_of_several_steps_give_the_models_own_logits(family: str, executor: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2))
        if family == "llama"
        else OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64))
    )
    model.save_pretrained(tmp_path)
    own, served = loaded(tmp_path)
    execution = ServedExecution(served, AutoConfig.from_pretrained(tmp_path))
    try:
        expected = model_logits(own.model, WINDOW)
        torch.testing.assert_close(execution.logits(WINDOW), expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(execution.logits(WINDOW[:5]), expected[:5], rtol=1e-3, atol=1e-5)
        assert execution.decode_speed(WINDOW[:8], 4) > 0
        assert all(name.startswith("native-step/") == (executor == "native-step") for name in execution.kernels)
    finally:
        execution.close()
