"""A checkpoint so small that a step takes a millisecond: real files, real architecture, weights of no meaning."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
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


@pytest.fixture(scope="session")
def writer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> VariantSpec:
    """The tiny checkpoint with a tokenizer of single bytes, those of ASCII among the first 128, so that it can write JSON."""
    folder = tmp_path_factory.mktemp("writer") / "tiny"
    shutil.copytree(tiny, folder)
    plain = [chr(byte) for byte in range(0x21, 0x7F)]
    spaces = ["Ġ", "Ċ", "ĉ", "č"]  # as byte-level vocabularies spell space, newline, tab and return
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {*plain, *spaces})
    rust = RustTokenizer(models.BPE({character: index for index, character in enumerate([*plain, *spaces, *others])}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return VariantSpec(key=VariantKey(model="tiny", precision="fp32"), checkpoint_dir=str(folder), artifact_dir=None)
