"""`precis evaluate` over a small checkpoint: what it stores is what it measured, through what serves."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from model_store.store import Store
from quantizers.report import Profile, Report
from server.cli import main

WORDS = ("the", "of", "and", "to", "a", "in", "is", "that", "it", "for", "object", "class", "method", "value", "type", "name")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_evaluate_stores_what_it_prints(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = ("bf16", "rtn-w8a8", "smoothquant-w8a8")
    assert main(["evaluate", "tiny", *recipes, "--windows", "2", "--json", "--data-dir", str(data_dir)]) == 0
    printed = {each["recipe"]: Report.model_validate(each) for each in json.loads(capsys.readouterr().out)}
    assert tuple(printed) == recipes
    with Store(data_dir) as store:
        for slug, report in printed.items():
            variant = store.variants.get("tiny", slug)
            profile = None if variant.profile is None else Profile.model_validate(variant.profile)
            assert Report.model_validate({**(variant.report or {}), "profile": profile}) == report
            assert all(kernel.startswith("native-step/") for kernel in report.kernels), "measured is what serves"
            assert (report.quantization is None) == (slug == "bf16")
            if report.quantization is not None:
                assert report.quantization.seconds == variant.facts["seconds"] > 0
    assert printed["bf16"].profile is None and printed["bf16"].kernel_difference is None
    smoothed = printed["smoothquant-w8a8"]
    assert abs(smoothed.kernel_difference or 1) < 0.5, "a bf16 model and its fp32 arithmetic lose about the same"
    assert smoothed.profile is not None and smoothed.profile.after is not None
    assert smoothed.profile.after.inputs[0].outlier < smoothed.profile.before.inputs[0].outlier / 2
