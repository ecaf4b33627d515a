"""A checkpoint so small that a step takes a millisecond: real files, real architecture, weights of no meaning."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.engine.interface import VariantKey, VariantSpec

TINY_VOCAB = 128
TINY_CONTEXT = 65536


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with a vocabulary of 128 and no end of sequence."""
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def specs(tiny: Path) -> dict[str, VariantSpec]:
    """The tiny checkpoint's baselines by precision."""
    return {
        precision: VariantSpec(key=VariantKey(model="tiny", precision=precision), checkpoint_dir=str(tiny), artifact_dir=None)
        for precision in ("fp32", "bf16", "fp16")
    }
