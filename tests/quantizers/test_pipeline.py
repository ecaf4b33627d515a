"""The walk: one block at a time, every layer exactly once, failures with the layer's name, and no more memory than a block needs."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from transformers import PretrainedConfig

from quantizers.calibration import Calibration
from quantizers.errors import CorruptData, InvalidInput, OutOfMemory, QuantizationFailed
from quantizers.methods.base import METHODS, Method
from quantizers.methods.rtn import quantize_nearest
from quantizers.pipeline import Block, Progress, quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import BnbScheme, FloatScheme, IntegerScheme
from tests.quantizers.apart import quantized
from tests.quantizers.conftest import MemoryTensors, calibration_tokens, tiny_config


def test_every_layer_is_written_once_with_its_error(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    sink = MemoryTensors()
    steps: list[Progress] = []
    result = quantize(model.config, checkpoint, parse_recipe("rtn-w4g32z"), sink.__setitem__, progress=steps.append)
    layers = result.layers
    assert len({layer.name for layer in layers}) == len(layers) == (14 if family != "gpt2" else 8)
    assert set(sink) == {f"{layer.name}.{tensor}" for layer in layers for tensor in ("codes", "scale", "zero_point")}
    assert result.bytes == sum(layer.bytes for layer in layers) == sum(tensor.nbytes for tensor in sink.values())
    assert all(0.01 < layer.relative_error < 0.2 for layer in layers), "four bits of normal weights are off by about a tenth"
    assert [step.stage for step in steps] == ["try", *["quantize"] * len(layers)]
    assert [step.done for step in steps] == list(range(len(layers) + 1)) and steps[-1].seconds_left == 0


def test_gpt2s_transposed_layers_are_quantized_along_their_inputs(tiny: Callable) -> None:
    model, checkpoint = tiny("gpt2")
    sink = MemoryTensors()
    quantize(model.config, checkpoint, parse_recipe("rtn-w8g32"), sink.__setitem__)
    weight = checkpoint["transformer.h.0.mlp.c_fc.weight"]  # [in, out]
    scheme = IntegerScheme(weight_bits=8, group_size=32)
    assert torch.equal(sink["transformer.h.0.mlp.c_fc.codes"], quantize_nearest(weight.T, scheme, layer="c_fc").tensors["codes"])


def test_the_output_matrix_in_pieces_is_the_output_matrix_at_once(tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = tiny("llama-tied")
    sink = MemoryTensors()
    monkeypatch.setattr("quantizers.pipeline._PIECE", 7 * 64)
    result = quantize(model.config, checkpoint, parse_recipe("rtn-w4g32-head8"), sink.__setitem__)
    scheme = IntegerScheme(weight_bits=8, group_size=32)
    whole = quantize_nearest(checkpoint["model.embed_tokens.weight"], scheme, layer="lm_head")
    for name, tensor in whole.tensors.items():
        assert torch.equal(sink[f"lm_head.{name}"], tensor)
    weight = checkpoint["model.embed_tokens.weight"]
    assert result.layers[-1].name == "lm_head" and result.layers[-1].bytes == whole.bytes
    assert result.layers[-1].relative_error == pytest.approx(((weight - whole.dequantize()).norm() / weight.norm()).item(), rel=1e-4)


def test_the_checkpoint_is_left_alone(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    before = {name: tensor.clone() for name, tensor in checkpoint.items()}
    quantize(model.config, checkpoint, parse_recipe("bnb-int8"), MemoryTensors().__setitem__)
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_numbers_that_are_not_finite_fail_with_the_tensors_name(tiny: Callable, key: str) -> None:
    model, checkpoint = tiny("llama")
    checkpoint[key] = checkpoint[key].clone()
    checkpoint[key].view(-1)[3] = float("inf")
    with pytest.raises(QuantizationFailed) as failure:
        quantize(model.config, checkpoint, parse_recipe("rtn-w8"), MemoryTensors().__setitem__)
    assert failure.value.layer == key


def test_groups_that_do_not_fit_fail_with_the_layers_name(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")  # 64 inputs
    sink = MemoryTensors()
    with pytest.raises(QuantizationFailed, match=r"model\.layers\.0\.self_attn\.q_proj: its 64 inputs .* choose g32, g64"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g128"), sink.__setitem__)
    with pytest.raises(QuantizationFailed, match=r"model\.layers\.1\.self_attn\.o_proj: its 64 inputs .* choose g32, g64"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g32-layers.1.selfattn.oproj.w4g128"), sink.__setitem__)
    assert not sink, "nothing is quantized before all formats are known to fit"


def test_a_checkpoint_that_is_not_its_configs_is_corrupt(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    del checkpoint["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CorruptData, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w8"), MemoryTensors().__setitem__)


def test_a_baseline_has_nothing_to_quantize(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    with pytest.raises(InvalidInput, match="bf16 is a baseline"):
        quantize(model.config, checkpoint, parse_recipe("bf16"), MemoryTensors().__setitem__)


@pytest.mark.parametrize("slug", ["rtn-w4g32", "gptq-w4g32", "awq-w4g32", "smoothquant-w8a8", "bnb-nf4"])
def test_the_largest_layer_is_tried_first(slug: str, tiny: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that its method cannot do, here for want of memory, stops the run before the first block, with every method."""
    model, checkpoint = tiny("llama")
    recipe, sink = parse_recipe(slug), MemoryTensors()
    tried: list[str] = []

    def refuse(name: str, *_: object) -> None:
        tried.append(name)
        raise MemoryError

    given = calibration_tokens() if recipe.needs_calibration else None
    quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=given)
    assert sink, "the trial itself passes"
    sink.clear()
    monkeypatch.setattr(Block, "put", lambda self, name, weight: refuse(name))
    with pytest.raises(OutOfMemory, match=r"down_proj: there is not enough memory to quantize it: free some"):
        quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=given)
    assert tried == ["model.layers.0.mlp.down_proj"] and not sink


def test_a_shared_inputs_formats_are_compared_before_the_first_block(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    sink = MemoryTensors()
    recipe = parse_recipe("gptq-w4g32-layers.1.selfattn.kproj.w8g32")
    with pytest.raises(InvalidInput, match=r"layers\.1\.self_attn\.q_proj and .*layers\.1\.self_attn\.k_proj share an input"):
        quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=calibration_tokens())
    assert not sink


class Cancelled(Exception): ...


def test_what_progress_raises_ends_the_run(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    sink = MemoryTensors()

    def cancel(step: Progress) -> None:
        if step.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        quantize(model.config, checkpoint, parse_recipe("rtn-w8"), sink.__setitem__, progress=cancel)
    assert len(sink) == 3 * 2


@pytest.fixture
def careless() -> type[Method]:
    """A method that forgets a layer, or hands one over twice."""

    class Careless(Method):
        name: Literal["careless"] = "careless"
        summary: ClassVar[str] = "forgets"
        twice: bool = False

        def check(self, scheme: FloatScheme | IntegerScheme | BnbScheme) -> None: ...

        def apply(self, block: Block) -> None:
            for name, linear in block.linears.items():
                if self.twice or not name.endswith("down_proj"):
                    weight = quantize_nearest(linear.weight, block.schemes[name], layer=name)  # type: ignore[arg-type]
                    block.put(name, weight)
                    if self.twice:
                        block.put(name, weight)

    yield Careless
    del METHODS["careless"]


@pytest.mark.parametrize(("twice", "message"), [(False, r"down_proj: the method left 1 layers"), (True, "handed over twice")])
def test_a_method_that_forgets_or_repeats_a_layer_fails(careless: type[Method], tiny: Callable, twice: bool, message: str) -> None:
    model, checkpoint = tiny("llama")
    recipe = Recipe(methods=(careless(name="careless", twice=twice),), scheme=IntegerScheme(weight_bits=8))
    with pytest.raises(QuantizationFailed, match=message):
        quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__)


def test_the_peak_is_some_blocks_not_the_model(demo: Path, apart: Executor) -> None:
    """A block of the demo model takes 14 MB in fp32, its linear layers together 425 MB."""
    result = apart.submit(quantized, demo, "rtn-w4g32m").result()
    assert len(result.layers) == 210 and max(layer.relative_error for layer in result.layers) == 0
    assert 0.8 < result.peak_bytes / result.predicted_peak_bytes < 1.2


def test_an_architecture_that_does_not_exist_is_refused() -> None:
    config = tiny_config("llama")
    config.num_key_value_heads = 3
    config.model_type = "nonsense"
    with pytest.raises(InvalidInput, match="cannot build"):
        quantize(PretrainedConfig(), MemoryTensors(), parse_recipe("rtn-w8"), lambda name, tensor: None)


def test_calibration_is_recorded_and_asked_for(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    given = calibration_tokens(4, 16, padded=True)
    result = quantize(model.config, checkpoint, parse_recipe("gptq-w4g32"), MemoryTensors().__setitem__, calibration=given)
    assert result.calibration == {"source": "random", "sha256": "0" * 64, "samples": 4, "length": 16, "tokens": 4 * 16 - 8}
    with pytest.raises(InvalidInput, match="gptq-w4g32 needs calibration tokens"):
        quantize(model.config, checkpoint, parse_recipe("gptq-w4g32"), MemoryTensors().__setitem__)
    with pytest.raises(InvalidInput, match="rtn-w4g32 looks at no calibration tokens: leave them out"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g32"), MemoryTensors().__setitem__, calibration=given)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((2, 65), 3), "samples of 65 tokens are longer than the model's 64"),
        (torch.full((2, 8), 96), "hold the id 96, the vocabulary has 0 to 95"),
        (torch.full((2, 8), -1), "hold the id -1"),
    ],
)
def test_calibration_tokens_that_the_model_has_no_place_for(tiny: Callable, tokens: torch.Tensor, message: str) -> None:
    model, checkpoint = tiny("llama")
    given = Calibration(tokens, torch.ones_like(tokens), "text", "0")
    with pytest.raises(InvalidInput, match=message):
        quantize(model.config, checkpoint, parse_recipe("gptq-w8"), MemoryTensors().__setitem__, calibration=given)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_damaged_checkpoint_fails_by_name_with_calibration_too(tiny: Callable, key: str) -> None:
    model, checkpoint = tiny("llama")
    checkpoint[key] = checkpoint[key].clone()
    checkpoint[key].view(-1)[3] = float("nan")
    with pytest.raises(QuantizationFailed) as failure:
        quantize(model.config, checkpoint, parse_recipe("gptq-w8"), MemoryTensors().__setitem__, calibration=calibration_tokens())
    assert failure.value.layer == key
