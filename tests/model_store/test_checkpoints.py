"""What becomes a checkpoint and what is refused, each refusal in words that name the file and the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.architectures import causal_lm_architectures
from model_store.store import Store
from quantizers.errors import Conflict, CorruptData, InvalidInput, NotFound


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({key: value for key, value in {**json.loads(path.read_text()), **changes}.items() if value != "absent"}))


def sharded(folder: Path) -> None:
    """Split the weights in two files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": list(tensors)[:5], "model-00002-of-00002.safetensors": list(tensors)[5:]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    mapping = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def test_a_folder_becomes_a_checkpoint_with_its_facts(store: Store, folder: Path) -> None:
    (folder / "README.md").write_text("not a part of the model")
    checkpoint = store.checkpoints.import_folder("tiny", folder)
    assert (checkpoint.model_type, checkpoint.vocab_size, checkpoint.num_layers, checkpoint.max_position_embeddings) == (
        "llama",
        64,
        2,
        128,
    )
    assert (checkpoint.dtype, checkpoint.source, checkpoint.name) == ("fp32", "folder", "tiny")
    assert checkpoint.bytes == sum(path.stat().st_size for path in checkpoint.dir.iterdir() if path.name != "checkpoint.json")
    assert {path.name for path in checkpoint.dir.iterdir()} == {path.name for path in folder.iterdir()} - {"README.md"} | {
        "checkpoint.json"
    }
    assert store.checkpoints.get("tiny") == checkpoint == store.checkpoints.verify("tiny")
    assert store.checkpoints.list() == [checkpoint]


def test_transformers_loads_the_checkpoint_and_tensors_gives_its_weights(store: Store, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = store.checkpoints.import_folder("tiny", folder)
    state = AutoModelForCausalLM.from_pretrained(checkpoint.dir).state_dict()
    source = checkpoint.tensors()
    assert all(torch.equal(source.get(name), state[name]) for name in list(source.keys()))


def test_large_files_are_linked_and_small_ones_copied(store: Store, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.more": torch.zeros(1 << 18)}, folder / "model.safetensors")  # past the bound of 1 MiB
    checkpoint = store.checkpoints.import_folder("tiny", folder)
    assert (folder / "model.safetensors").samefile(checkpoint.dir / "model.safetensors")
    assert not (folder / "config.json").samefile(checkpoint.dir / "config.json")


def test_the_same_bytes_twice_are_one_checkpoint_and_others_a_conflict(store: Store, folder: Path) -> None:
    first = store.checkpoints.import_folder("tiny", folder)
    assert store.checkpoints.import_folder("tiny", folder) == first
    assert store.checkpoints.import_folder("other", folder).digest == first.digest
    rewritten(folder / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(Conflict, match="'tiny' is taken"):
        store.checkpoints.import_folder("tiny", folder)
    assert store.checkpoints.get("tiny") == first


def test_shards_with_their_index(store: Store, folder: Path) -> None:
    sharded(folder)
    checkpoint = store.checkpoints.import_folder("tiny", folder)
    assert len(checkpoint.weight_files) == 2
    assert checkpoint.tensors().shape("model.embed_tokens.weight") == (64, 64)


def test_gpt2_names_its_facts_otherwise(store: Store, folder: Path) -> None:
    changes: dict[str, Any] = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_positions": 77}
    rewritten(folder / "config.json", num_hidden_layers="absent", max_position_embeddings="absent", **changes)
    checkpoint = store.checkpoints.import_folder("g", folder)
    assert (checkpoint.num_layers, checkpoint.max_position_embeddings) == (3, 77)


@pytest.mark.parametrize("name", ["", "A", "a@b", "a/b", "..", ".a", "-a", "a" * 65, "a\n", "ä", "a.", "a b"])
def test_names_that_cannot_be_model_ids(name: str, store: Store, folder: Path) -> None:
    for use in (
        lambda: store.checkpoints.import_folder(name, folder),
        lambda: store.checkpoints.get(name),
        lambda: store.checkpoints.delete(name),
    ):
        with pytest.raises(InvalidInput) as caught:
            use()
        assert caught.value.param == "name"


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder / "config.json", **changes)


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        sharded(folder)
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return apply


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unlink("config.json"), "config.json is missing"),
        (unlink("tokenizer.json"), "the tokenizer is missing"),
        (unlink("model.safetensors"), "missing model.safetensors"),
        (write("config.json", b"{"), "config.json is not valid JSON"),
        (write("config.json", b"[" * 100_000), "config.json is not valid JSON"),
        (write("config.json", b"[]"), "config.json is not a JSON object"),
        (write("tokenizer.json", b"\xff"), "tokenizer.json is not valid JSON"),
        (write("model.safetensors", b"no"), "model.safetensors is not a whole safetensors file"),
        (write("pytorch_model.bin", b"x"), "pytorch_model.bin is of a format that can run code"),
        (write("model.PT", b"x"), "model.PT is of a format that can run code"),
        (write("consolidated.safetensors", b"x"), "not called for consolidated.safetensors"),
        (write("tokenizer_config.json", b'{"auto_map": {}}'), "tokenizer_config.json has auto_map"),
        (config(auto_map={"AutoModel": "x.Y"}), "no trust_remote_code"),
        (config(model_type="absent"), "model_type"),
        (config(model_type="bert-of-nobody"), "bert-of-nobody"),
        (config(model_type=["llama"]), "model_type"),
        (config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (config(quantization_config={"quant_method": "gptq"}), "quantized already"),
        (config(vocab_size="absent"), "lacks vocab_size"),
        (config(vocab_size=-1), "vocab_size '-1'"),
        (config(num_hidden_layers=True), "num_hidden_layers 'True'"),
        (config(num_hidden_layers=10**30), "num_hidden_layers"),
        (linked("model.safetensors"), "is a link"),
        (linked("config.json"), "is a link"),
        (index(lambda mapping: mapping.popitem()), "disagree about"),
        (index(lambda mapping: mapping.update(x="model-00001-of-00002.safetensors")), "disagree about x"),
        (index(lambda mapping: mapping.update(x="model-00009-of-00002.safetensors")), "missing model-00009-of-00002.safetensors"),
        (index(lambda mapping: mapping.update(x="../../secret")), "missing ../../secret"),
        (index(lambda mapping: mapping.update(x=1)), "no weight_map"),
        (index(lambda mapping: mapping.clear()), "no weight_map"),
    ],
)
def test_folders_that_are_no_checkpoint(change: Callable[[Path], None], words: str, store: Store, folder: Path) -> None:
    change(folder)
    with pytest.raises(InvalidInput) as caught:
        store.checkpoints.import_folder("tiny", folder)
    assert words in caught.value.message
    assert store.checkpoints.list() == []
    assert list(store.data_dir.joinpath("checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "filename", ["../config.json", "a/b.json", "a\\b.json", ".hidden.json", "a\x00.json", "x" * 256 + ".json", "", "a.json ", "model.exe"]
)
def test_uploaded_names_that_lead_elsewhere(filename: str, store: Store, folder: Path) -> None:
    files = {path.name: path for path in folder.iterdir()} | {filename: folder / "config.json"}
    with pytest.raises(InvalidInput):
        store.checkpoints.import_files("tiny", files)


def test_uploaded_files_take_the_names_they_are_given(store: Store, folder: Path, tmp_path: Path) -> None:
    files = {}
    for number, path in enumerate(folder.iterdir()):
        files[path.name] = Path(shutil.copy(path, tmp_path / f"file-{number}"))
    checkpoint = store.checkpoints.import_files("up", files)
    assert checkpoint.source == "upload"
    assert checkpoint.digest == store.checkpoints.import_folder("tiny", folder).digest


def test_uploads_that_are_not_one_checkpoint(store: Store, folder: Path) -> None:
    every = {path.name: path for path in folder.iterdir()}
    for files, words in (
        ({}, "no files"),
        ({**every, "checkpoint.json": folder / "config.json"}, "written by the import"),
        ({**every, "m.gguf": folder / "config.json"}, "comes alone"),
    ):
        with pytest.raises(InvalidInput, match=words):
            store.checkpoints.import_files("tiny", files)


def test_missing_deleted_and_changed_checkpoints(store: Store, folder: Path) -> None:
    with pytest.raises(NotFound, match="there are: none"):
        store.checkpoints.get("tiny")
    checkpoint = store.checkpoints.import_folder("tiny", folder)
    with (checkpoint.dir / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptData, match=r"config\.json"):
        store.checkpoints.verify("tiny")
    (checkpoint.dir / "checkpoint.json").write_text("{}")
    with pytest.raises(CorruptData, match="import it again"):
        store.checkpoints.get("tiny")
    assert store.checkpoints.list() == []
    (checkpoint.dir / "checkpoint.json").write_text(checkpoint.model_dump_json(exclude={"dir"}))
    store.checkpoints.delete("tiny")
    with pytest.raises(NotFound):
        store.checkpoints.delete("tiny")


def test_the_table_of_architectures_is_transformers_own() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_lm_architectures() == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
