"""A small checkpoint with a tokenizer, real in every file, in a data directory of its own."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from model_store.store import Store

WORDS = ("the", "of", "and", "to", "a", "in", "is", "that", "it", "for", "object", "class", "method", "value", "type", "name")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the checkpoint `tiny`, a Llama of two layers that knows sixteen words."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 1, max_position_embeddings=1024, tie_word_embeddings=True, **sizes))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] *= 20  # an outlier for smoothquant to take away
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(("[UNK]", *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    data_dir = tmp_path_factory.mktemp("data")
    with Store(data_dir) as store:
        store.checkpoints.import_folder("tiny", folder)
    return data_dir
