"""A loaded model is transformers' own, bytes are what is held and were predicted, and nothing of either file goes unaccounted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from quantizers.errors import CorruptData, InvalidInput
from quantizers.linear import QuantizedLinear
from quantizers.model import LoadedModel, load_model, predict_bytes
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.shared import SharedTensors
from quantizers.tensors import TensorSource
from tests.quantizers.conftest import MemoryTensors, calibration_tokens

RECIPES = (
    *("fp32", "bf16", "fp16", "rtn-w8", "rtn-w8g32", "rtn-w4", "rtn-w4g32", "rtn-w4g32z", "rtn-w4g32m", "rtn-w3g64", "rtn-w2g64z"),
    *(
        "rtn-w8a8",
        "rtn-w4g64-head8",
        "rtn-w4g32za8",
        "rtn-fp8",
        "rtn-mxfp4",
        "rtn-nvfp4",
        "bnb-int8",
        "bnb-int8t0",
        "bnb-nf4",
        "bnb-fp4",
        "bnb-nf4dq",
    ),
)
TOKENS = torch.arange(24)[None] % 90


def load(slug: str, config: PretrainedConfig, checkpoint: TensorSource, shared: SharedTensors | None = None) -> LoadedModel:
    artifact = None
    if not parse_recipe(slug).is_baseline:
        artifact = MemoryTensors()
        quantize(config, checkpoint, parse_recipe(slug), artifact.__setitem__)
    return load_model(
        config, parse_recipe(slug), checkpoint, artifact, device="cpu", shared=shared or SharedTensors(), checkpoint_key="checkpoint"
    )


def logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def test_fp32_is_transformers_to_the_bit(demo: Path, demo_config: PretrainedConfig, demo_tensors: TensorSource) -> None:
    tokens = AutoTokenizer.from_pretrained(demo, local_files_only=True)("def fib(n):  # Größe, 数, 🙂", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32, local_files_only=True).eval()
    ours = load("fp32", demo_config, demo_tensors)
    assert torch.equal(logits(ours.model, tokens), logits(theirs, tokens))


def test_bf16_is_transformers_to_the_bit(demo: Path, demo_config: PretrainedConfig, demo_tensors: TensorSource) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16, local_files_only=True).eval()
    assert torch.equal(logits(load("bf16", demo_config, demo_tensors).model), logits(theirs))


def test_every_architecture_in_fp32_is_transformers_to_the_bit(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    assert torch.equal(logits(load("fp32", model.config, checkpoint).model), logits(model))


@pytest.mark.parametrize("slug", RECIPES)
def test_bytes_are_predicted_to_the_byte(family: str, tiny: Callable, slug: str) -> None:
    model, checkpoint = tiny(family)
    recipe = parse_recipe(slug)
    loaded = load(slug, model.config, checkpoint)
    assert predict_bytes(model.config, recipe, checkpoint) == loaded.bytes
    assert sum(loaded.bytes.values()) == sum(loaded.bytes_by_dtype.values())
    assert torch.isfinite(logits(loaded.model)).all()


def test_bytes_worked_by_hand(demo_config: PretrainedConfig, demo_tensors: TensorSource) -> None:
    """106168320 weights in 210 layers; embedding 49152 x 576 and 61 norms of 576 in bf16; 32 rotary frequencies, twice, in fp32.

    Three bits take a scale of two bytes and a zero point of one a group, in the reference kernel and in the native one.
    """
    weights, shared, rotary = 106_168_320, 2 * (49152 * 576 + 61 * 576), 2 * 32 * 4
    predicted = predict_bytes(demo_config, parse_recipe("bf16"), demo_tensors)
    assert predicted == {"weights": 2 * weights + rotary, "shared_weights": shared}
    predicted = predict_bytes(demo_config, parse_recipe("rtn-w3g64z"), demo_tensors)  # as stored
    assert predicted == {"weights": weights * 3 // 8 + weights // 64 * (2 + 1) + rotary, "shared_weights": shared}


@pytest.mark.parametrize("slug", [slug for slug in RECIPES if not parse_recipe(slug).is_baseline])
def test_a_quantized_model_is_transformers_with_the_dequantized_weights(family: str, tiny: Callable, slug: str) -> None:
    """What is executed is what was stored: transformers' own fp32 model with those weights gives nearly these logits."""
    model, checkpoint = tiny(family)
    loaded = load(slug, model.config, checkpoint)
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == sum(count for kernel, count in loaded.kernels.items() if kernel != "torch")
    expected = logits(model)
    error = (logits(loaded.model).float() - expected).norm() / expected.norm()
    # Random weights: of 2, 3, 4 and 8 bits, and bf16 (0.005); measured on these models with a margin of two.
    bits = 4 if slug in ("bnb-nf4", "bnb-fp4") else 8 if slug == "bnb-int8" else parse_recipe(slug).scheme.weight_bits
    assert error < {2: 1.2, 3: 0.6, 4: 0.4, 8: 0.05}[bits]


def test_variants_share_what_they_do_not_quantize(demo_config: PretrainedConfig, demo_tensors: TensorSource) -> None:
    shared = SharedTensors()
    loaded = [load(slug, demo_config, demo_tensors, shared) for slug in ("bf16", "rtn-w4g64", "bnb-nf4")]
    embeddings = {model.model.get_input_embeddings().weight.data_ptr() for model in loaded}
    assert len(embeddings) == 1 and shared.bytes == loaded[0].bytes["shared_weights"] == loaded[2].bytes["shared_weights"]
    for model in loaded:
        model.close()
        model.close()
    assert shared.count == 0
    assert not list(loaded[0].model.parameters()), "a closed model holds nothing, whoever still refers to it"


def test_a_second_dtype_is_a_second_copy(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    shared = SharedTensors()
    first, second = (load(slug, model.config, checkpoint, shared) for slug in ("fp32", "bf16"))
    assert shared.bytes == first.bytes["shared_weights"] + second.bytes["shared_weights"]


def test_tied_weights_are_counted_once(tiny: Callable) -> None:
    tied, untied = (load("fp32", model.config, checkpoint) for model, checkpoint in (tiny("llama-tied"), tiny("llama")))
    assert untied.bytes["shared_weights"] - tied.bytes["shared_weights"] == 96 * 64 * 4
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight


def test_either_of_two_tied_names_fills_both_and_equal_copies_are_one(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    expected = logits(model)
    checkpoint["lm_head.weight"] = checkpoint["model.embed_tokens.weight"].clone()
    both = load("fp32", model.config, checkpoint)
    assert torch.equal(logits(both.model), expected) and both.model.lm_head.weight is both.model.model.embed_tokens.weight
    del checkpoint["model.embed_tokens.weight"]
    assert torch.equal(logits(load("fp32", model.config, checkpoint).model), expected)


def test_two_tied_names_that_differ_are_not_tied(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    checkpoint["lm_head.weight"] = checkpoint["model.embed_tokens.weight"] * 2
    loaded = load("fp32", model.config, checkpoint)
    torch.testing.assert_close(logits(loaded.model), logits(model) * 2)
    assert predict_bytes(model.config, parse_recipe("fp32"), checkpoint) == loaded.bytes


def test_the_output_matrix_at_eight_bits_leaves_the_embedding(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    loaded = load("rtn-w4g64-head8", model.config, checkpoint)
    assert isinstance(loaded.model.lm_head, QuantizedLinear) and loaded.model.lm_head.scheme.slug == "w8g32"
    assert torch.equal(loaded.model.model.embed_tokens.weight, checkpoint["model.embed_tokens.weight"].bfloat16())


def test_a_base_models_names_are_found(tiny: Callable) -> None:
    """GPT-2's published checkpoints have no `transformer.` before their names, and masks that no model needs."""
    model, checkpoint = tiny("gpt2")
    bare = MemoryTensors({name.removeprefix("transformer."): tensor for name, tensor in checkpoint.items()})
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    assert torch.equal(logits(load("fp32", model.config, bare).model), logits(model))


def test_every_tensor_of_the_checkpoint_is_accounted_for(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    changes: list[tuple[str, Callable[[MemoryTensors], None]]] = [
        (r"lacks 1 tensors .*: model\.norm\.weight", lambda tensors: tensors.pop("model.norm.weight")),
        (r"has 1 tensors that .*: model\.extra", lambda tensors: tensors.__setitem__("model.extra", torch.zeros(1))),
        (r"model\.norm\.weight has the shape \[63\]", lambda tensors: tensors.__setitem__("model.norm.weight", torch.zeros(63))),
    ]
    for message, change in changes:
        broken = MemoryTensors(checkpoint)
        change(broken)
        for attempt in (load, lambda slug, config, source: predict_bytes(config, parse_recipe(slug), source)):
            with pytest.raises(CorruptData, match=message):
                attempt("bf16", model.config, broken)


def test_every_tensor_of_the_artifact_is_accounted_for(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe, artifact = parse_recipe("rtn-w4g32"), MemoryTensors()
    quantize(model.config, checkpoint, recipe, artifact.__setitem__)
    key = "model.layers.0.mlp.up_proj.scale"
    changes: list[tuple[str, Callable[[MemoryTensors], None]]] = [
        (f"lacks .*{key}", lambda tensors: tensors.pop(key)),
        ("has .*stray", lambda tensors: tensors.__setitem__("stray", torch.zeros(1))),
        ("up_proj: scale of a weight", lambda tensors: tensors.__setitem__(key, tensors[key].float())),
        ("up_proj: scale of a weight", lambda tensors: tensors.__setitem__(key, tensors[key][:1])),
        ("not finite", lambda tensors: tensors.__setitem__(key, tensors[key] * float("nan"))),
    ]
    shared = SharedTensors()
    for message, change in changes:
        broken = MemoryTensors(artifact)
        change(broken)
        with pytest.raises(CorruptData, match=message):
            load_model(model.config, recipe, checkpoint, broken, device="cpu", shared=shared, checkpoint_key="x")
    assert shared.count == 0, "a load that failed holds nothing"


def test_a_load_that_fails_late_gives_its_shared_tensors_back(tiny: Callable) -> None:
    class Failing(MemoryTensors):
        def get(self, name: str) -> torch.Tensor:
            if name == "model.norm.weight":
                raise OSError("the disk went away")
            return super().get(name)

    model, checkpoint = tiny("llama")
    shared = SharedTensors()
    with pytest.raises(OSError, match="the disk went away"):
        load_model(model.config, parse_recipe("bf16"), Failing(checkpoint), None, device="cpu", shared=shared, checkpoint_key="checkpoint")
    assert shared.count == 0


def test_recipe_and_artifact_go_together(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    for slug, artifact in (("bf16", MemoryTensors()), ("rtn-w8", None)):
        with pytest.raises(InvalidInput, match="artifact"):
            load_model(model.config, parse_recipe(slug), checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="x")


@pytest.mark.parametrize("slug", ["smoothquant-w8a8", "awq-w4g32z"])
@pytest.mark.parametrize("changed_family", ["llama", "gpt2"])
def test_norms_that_a_method_changed_are_the_variants_own(changed_family: str, tiny: Callable, slug: str) -> None:
    """They come from the artifact, count as its weights, and are predicted to the byte; the checkpoint's go to the other variants."""
    model, checkpoint = tiny(changed_family)
    recipe, artifact = parse_recipe(slug), MemoryTensors()
    result = quantize(model.config, checkpoint, recipe, artifact.__setitem__, calibration=calibration_tokens())
    assert result.changed and all("ln_" in name or "norm" in name or "bias" in name for name in result.changed)
    assert result.bytes == sum(tensor.nbytes for tensor in artifact.values())
    shared = SharedTensors()
    loaded = load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=shared, checkpoint_key="checkpoint")
    assert predict_bytes(model.config, recipe, checkpoint, artifact) == loaded.bytes
    for name in result.changed:
        assert torch.equal(loaded.model.get_parameter(name), artifact[name].bfloat16())
    plain = load("bf16", model.config, checkpoint, shared)
    assert plain.bytes["shared_weights"] - loaded.bytes["shared_weights"] == 2 * sum(artifact[name].numel() for name in result.changed)
    assert torch.isfinite(logits(loaded.model)).all()


@pytest.mark.parametrize("bad", ["shape", "nan", "elsewhere", "rtn"])
def test_a_changed_norm_that_does_not_belong_is_corrupt(tiny: Callable, bad: str) -> None:
    model, checkpoint = tiny("llama")
    artifact, name = MemoryTensors(), "model.layers.0.input_layernorm.weight"
    recipe = parse_recipe("rtn-w8" if bad == "rtn" else "smoothquant-w8a8")
    quantize(model.config, checkpoint, recipe, artifact.__setitem__, calibration=None if bad == "rtn" else calibration_tokens())
    if bad == "elsewhere":
        artifact["model.norm.weight"] = torch.ones(64)
    else:
        artifact[name] = {"shape": torch.ones(3), "nan": torch.full((64,), float("nan")), "rtn": torch.ones(64)}[bad]
    with pytest.raises(CorruptData, match="norm"):
        load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="checkpoint")
