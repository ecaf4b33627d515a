"""Exported variants, read by transformers and compressed-tensors themselves: an implementation of every integer format that is not ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from model_store.checkpoints import Checkpoint
from model_store.formats.compressed_tensors import layer_tensors
from model_store.formats.safetensors import SafetensorsWriter
from model_store.store import Store
from model_store.variants import Manifest
from quantizers.errors import Conflict, CorruptData, InvalidInput, UnsupportedScheme
from quantizers.linear import QuantizedLinear
from quantizers.methods.rtn import quantize_nearest
from quantizers.model import load_model, load_reference
from quantizers.packing import unpack
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import IntegerScheme
from quantizers.shared import SharedTensors
from server.cli import main
from server.exporting import export
from tests.quantizers.conftest import MemoryTensors, calibration_tokens, tiny_config

# Both sides multiply the same fp32 weights; sums in another order differ in the last bits.
SAME_WEIGHTS = 1e-5
SAME_LAYER = 1e-6
ROUNDED_WEIGHTS = 5e-3
# A token that lies between two codes can round to the other one after such a difference: one step in 127 of one input of a layer.
SAME_TOKENS = 5e-3
# bf16 activations and inputs rounded to 8 bits in groups, on random weights that forgive nothing.
SERVED = 4e-2

EXACT = (
    "rtn-w2g32", "rtn-w3g32z", "rtn-w4g64", "rtn-w4g64z", "rtn-w4", "rtn-w8", "rtn-w8z", "rtn-w8g32",
    "gptq-w4g32z", "gptq-w3g32", "awq-w4g32z", "rtn-w4g64-head8", "gptq-mix3.5g32", "rtn-w4g32-downproj.w8g32-layers.0.bf16",
    "rtn-mxfp4", "rtn-w4g32-head8-embed8", "rtn-w8g32-head8-embed8",
)  # fmt: skip
SEVERAL_WITH_ZERO_POINTS = ("gptq-mix3.5g32z", "rtn-w4g32-downproj.w8g32z-layers.0.bf16", "awq-w4g32z-head8")
TOKENS = ("rtn-w8a8", "smoothquant-w8a8", "smoothquant-gptq-w8a8", "rtn-w8a8-head8", "rtn-w4g32a8", "rtn-w3g64a8", "rtn-fp8")
BF16_WEIGHTS = ("rtn-nvfp4",)  # the library multiplies them out in bf16


def saved(folder: Path, config: LlamaConfig | GPT2Config) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(96)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def llama(*, tied: bool) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=96, max_position_embeddings=64, tie_word_embeddings=tied, **sizes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


@pytest.fixture
def checkpoint(store: Store, tmp_path: Path) -> Checkpoint:
    return store.checkpoints.import_folder("tiny", saved(tmp_path / "tiny", llama(tied=True)))


def artifact_of(checkpoint: Checkpoint, slug: str) -> MemoryTensors:
    recipe, artifact = parse_recipe(slug), MemoryTensors()
    calibration = calibration_tokens() if recipe.needs_calibration else None
    quantize(AutoConfig.from_pretrained(checkpoint.dir), checkpoint.tensors(), recipe, artifact.__setitem__, calibration=calibration)
    return artifact


def exported(checkpoint: Checkpoint, slug: str, artifact: MemoryTensors | None, folder: Path, dtype: str = "fp32") -> Path:
    export(checkpoint, parse_recipe(slug), artifact, folder, dtype=dtype, progress=lambda *_: None)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 51)[None]).logits.float()


def ours(load: Callable, checkpoint: Checkpoint, slug: str, artifact: MemoryTensors) -> torch.Tensor:
    config = AutoConfig.from_pretrained(checkpoint.dir)
    shared = SharedTensors()
    loaded = load(config, parse_recipe(slug), checkpoint.tensors(), artifact, device="cpu", shared=shared, checkpoint_key="tiny")
    try:
        return logits(loaded.model)
    finally:
        loaded.close()


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("slug", [*EXACT, *TOKENS, *BF16_WEIGHTS])
def test_transformers_computes_what_we_compute(slug: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = artifact_of(checkpoint, slug)
    theirs = logits(AutoModelForCausalLM.from_pretrained(exported(checkpoint, slug, artifact, tmp_path / "out"), dtype=torch.float32))
    allowed = SAME_TOKENS if slug in TOKENS else ROUNDED_WEIGHTS if slug in BF16_WEIGHTS else SAME_WEIGHTS
    assert difference(ours(load_reference, checkpoint, slug, artifact), theirs) < allowed
    assert difference(ours(load_model, checkpoint, slug, artifact), theirs) < SERVED


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("slug", ["rtn-w4g32", "gptq-w3g32"])
def test_experts_keep_the_names_of_their_checkpoint(family: str, slug: str, store: Store, tmp_path: Path) -> None:
    """From which transformers stacks them again."""
    checkpoint = store.checkpoints.import_folder("mixture", saved(tmp_path / "mixture", tiny_config(family)))
    artifact = artifact_of(checkpoint, slug)
    theirs = AutoModelForCausalLM.from_pretrained(exported(checkpoint, slug, artifact, tmp_path / "out"), dtype=torch.float32)
    assert difference(ours(load_reference, checkpoint, slug, artifact), logits(theirs)) < SAME_WEIGHTS


@pytest.mark.parametrize("slug", ["rtn-w8a8", "rtn-w4g32z"])
def test_experts_with_zero_points_or_eight_bit_tokens_are_written_and_transformers_cannot_read_them(
    slug: str, store: Store, tmp_path: Path
) -> None:
    """When it can, this fails: then `transformers_loads` says so too."""
    checkpoint = store.checkpoints.import_folder("mixture", saved(tmp_path / "mixture", tiny_config("mixtral")))
    folder = exported(checkpoint, slug, artifact_of(checkpoint, slug), tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale" in load_file(folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="automatic conversion"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("slug", TOKENS)
def test_every_layer_with_rounded_tokens_gives_the_same_for_the_same_input(slug: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A whole model amplifies a single rounding to the other side; a layer that is given our own input has none to amplify."""
    artifact = artifact_of(checkpoint, slug)
    theirs = AutoModelForCausalLM.from_pretrained(exported(checkpoint, slug, artifact, tmp_path / "out"), dtype=torch.float32)
    logits(theirs)  # the first pass multiplies the weights out
    config, options = AutoConfig.from_pretrained(checkpoint.dir), {"device": "cpu", "shared": SharedTensors(), "checkpoint_key": "tiny"}
    loaded = load_reference(config, parse_recipe(slug), checkpoint.tensors(), artifact, **options)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, (args[0].clone(), out.clone())))
    logits(loaded.model)
    assert len(seen) == 14 + slug.endswith("head8")
    with torch.inference_mode():
        assert max(difference(out, theirs.get_submodule(name)(x)) for name, (x, out) in seen.items()) < SAME_LAYER


@pytest.mark.parametrize("slug", SEVERAL_WITH_ZERO_POINTS)
def test_several_formats_with_zero_points_are_what_compressed_tensors_multiplies_out(
    slug: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """transformers' loader cannot read them yet. When it can, this fails: then `transformers_loads` and `dequantize` can go."""
    artifact = artifact_of(checkpoint, slug)
    folder = exported(checkpoint, slug, artifact, tmp_path / "out")
    assert difference(ours(load_reference, checkpoint, slug, artifact), logits(multiplied_out(folder))) < SAME_WEIGHTS
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def multiplied_out(folder: Path) -> PreTrainedModel:
    """The model of an exported folder in plain fp32 layers, every quantized one decompressed by the library."""
    config = json.loads((folder / "config.json").read_text())
    quantization = QuantizationConfig.model_validate(config.pop("quantization_config"))
    tensors = load_file(folder / "model.safetensors")
    for scheme in quantization.config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for name in scheme.targets:
            state = {local: tensors.pop(f"{name}.{local}") for local in compressor.compression_param_names(scheme)}
            tensors[f"{name}.weight"] = compressor.decompress(state, scheme)["weight"]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).float().eval()
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def test_the_comparison_above_tells_one_code_from_its_neighbour(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = artifact_of(checkpoint, "rtn-w8")
    folder = exported(checkpoint, "rtn-w8", artifact, tmp_path / "out")
    artifact["model.layers.0.self_attn.v_proj.codes"][0, 0] += 1
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert difference(ours(load_reference, checkpoint, "rtn-w8", artifact), theirs) > SAME_WEIGHTS


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    group=st.sampled_from((None, 32, 64)),
    zero=st.sampled_from(("none", "integer")),
    rows=st.integers(1, 37),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_their_unpacking_gives_our_codes(bits: int, group: int | None, zero: str, rows: int, groups: int, seed: int) -> None:
    """At every width, for rows and columns that fill no whole word, zero points at both ends of the range too."""
    scheme = IntegerScheme(weight_bits=bits, group_size=group, zero=zero)
    columns = groups * group if group else 7 * groups
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values[0] = values[0].abs()  # zero point 0
    values[-1] = -values[-1].abs()  # zero point 2^b - 1
    weight = quantize_nearest(values, scheme, layer="layer")
    tensors = layer_tensors(weight)
    codes = unpack(weight.tensors["codes"], bits, columns).to(torch.int16)
    signed = codes if codes.min() < 0 or (bits == 8 and zero == "none") else codes - (1 << (bits - 1))
    assert tensors["weight_packed"].shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, columns))).to(torch.int16), signed)
    assert tensors["weight_shape"].tolist() == [rows, columns]
    assert torch.equal(tensors["weight_scale"], weight.tensors["scale"])
    if zero == "integer":
        points = weight.tensors["zero_point"]
        unpacked = unpack_from_int32(tensors["weight_zero_point"], bits, points.shape, packed_dim=0).to(torch.int16)
        assert torch.equal(unpacked, points.to(torch.int16) - (1 << (bits - 1)))


def test_an_override_and_the_rest_are_groups_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    slug = "rtn-w4g32-downproj.w8g32-layers.0.bf16"
    folder = exported(checkpoint, slug, artifact_of(checkpoint, slug), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert groups[8] == ["model.layers.1.mlp.down_proj"]
    assert "model.layers.1.mlp.up_proj" in groups[4] and len(groups[4]) == 6
    assert {"lm_head", "model.layers.0.mlp.up_proj"} <= set(config["ignore"]) and len(config["ignore"]) == 8


def test_one_format_is_a_group_for_the_class(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = exported(checkpoint, "rtn-w4g32", artifact_of(checkpoint, "rtn-w4g32"), tmp_path / "out", dtype="bf16")
    config = json.loads((folder / "config.json").read_text())
    assert [group["targets"] for group in config["quantization_config"]["config_groups"].values()] == [["Linear"]]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] is True
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16 and "lm_head.weight" not in tensors
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert difference(logits(loaded), ours(load_model, checkpoint, "rtn-w4g32", artifact_of(checkpoint, "rtn-w4g32"))) < SERVED


def test_an_output_matrix_in_8_bits_leaves_the_embedding_that_it_was_tied_to(checkpoint: Checkpoint, tmp_path: Path) -> None:
    slug = "rtn-w4g64-head8"
    folder = exported(checkpoint, slug, artifact_of(checkpoint, slug), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight_packed" in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], checkpoint.tensors().get("model.embed_tokens.weight"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_baseline_is_a_plain_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = exported(checkpoint, "bf16", None, tmp_path / "out", dtype="bf16")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint.dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("slug", "message"),
    [("rtn-w4g32m", "real minimum.*export a variant in w4g32z"), ("bnb-nf4", "bitsandbytes"), ("bnb-int8", "bitsandbytes")],
)
def test_what_the_format_has_not_is_refused_before_anything_is_written(
    slug: str, message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedScheme, match=message):
        exported(checkpoint, slug, artifact_of(checkpoint, slug), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transposed_layers_are_refused(store: Store, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    checkpoint = store.checkpoints.import_folder("gpt2", saved(tmp_path / "gpt2", config))
    with pytest.raises(UnsupportedScheme, match="Conv1D"):
        exported(checkpoint, "rtn-w4g32", artifact_of(checkpoint, "rtn-w4g32"), tmp_path / "out")


def test_an_artifact_that_lacks_a_tensor_leaves_no_folder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = artifact_of(checkpoint, "rtn-w4g32")
    del artifact["model.layers.1.mlp.up_proj.scale"]
    with pytest.raises(CorruptData, match=r"up_proj\.scale"):
        exported(checkpoint, "rtn-w4g32", artifact, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "tiny"}


def test_a_folder_with_content_a_file_and_an_unwritable_place_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full" / "notes.txt"):
        with pytest.raises(Conflict, match="exists already"):
            exported(checkpoint, "bf16", None, taken, dtype="bf16")
    with pytest.raises(InvalidInput, match="cannot be written"):
        exported(checkpoint, "bf16", None, tmp_path / "full" / "notes.txt" / "below", dtype="bf16")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (exported(checkpoint, "bf16", None, tmp_path / "out", dtype="bf16") / "model.safetensors").is_file()


def test_an_untied_model_keeps_its_own_output_matrix(store: Store, tmp_path: Path) -> None:
    checkpoint = store.checkpoints.import_folder("untied", saved(tmp_path / "untied", llama(tied=False)))
    for slug in ("rtn-w4g32", "rtn-w4g32-head8"):
        artifact = artifact_of(checkpoint, slug)
        theirs = logits(AutoModelForCausalLM.from_pretrained(exported(checkpoint, slug, artifact, tmp_path / slug), dtype=torch.float32))
        assert difference(ours(load_reference, checkpoint, slug, artifact), theirs) < SAME_WEIGHTS


def test_the_command_writes_what_was_made_and_says_so(
    checkpoint: Checkpoint, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slug = "rtn-w4g32z-head8"
    with store.variants.create("tiny", slug) as draft:
        with SafetensorsWriter(draft.dir / "model.safetensors") as writer:
            for name, tensor in artifact_of(checkpoint, slug).items():
                writer(name, tensor)
        draft.commit(Manifest(checkpoint="tiny", checkpoint_digest=checkpoint.digest, recipe=parse_recipe(slug), slug=slug))
    command = ["export", f"tiny@{slug}", str(tmp_path / "out"), "--data-dir", str(store.data_dir)]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "w4g32z x14, w8g32 x1" in said and "transformers 5.24 cannot load" in said
    assert (tmp_path / "out" / "config.json").is_file()
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"precis: {str(tmp_path / 'out')!r} exists already")
    assert main(["export", "tiny@rtn-w3", str(tmp_path / "other"), "--data-dir", str(store.data_dir)]) == 2
    assert slug in capsys.readouterr().err
