"""Mixed precision and overrides: budgets are kept, bits go where the error falls most, and what was given is what is loaded."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import CorruptData, InvalidInput
from quantizers.linear import QuantizedLinear
from quantizers.mixed import Offer, spend
from quantizers.model import load_model
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import IntegerScheme
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import MemoryTensors, calibration_tokens

WIDTHS = (2, 3, 4, 8)
Groups = dict[tuple[str, ...], list[Offer]]


@st.composite
def convex_groups(draw: st.DrawFn) -> Groups:
    """Groups of one size whose error falls by less and less with every width, as rounding errors do."""
    groups: Groups = {}
    for index in range(draw(st.integers(1, 4))):
        falls = sorted((draw(st.integers(1, 64)) / 64 for _ in range(3)), reverse=True)  # sums of them are exact
        errors = [sum(falls[step:]) for step in range(4)]
        # Equal steps of bits, so that falling gains make the errors convex in the bits.
        offers = zip(WIDTHS, range(2, 6), errors, strict=True)
        groups[(f"layer{index}",)] = [Offer(IntegerScheme(weight_bits=width), bits, error) for width, bits, error in offers]
    return groups


@given(convex_groups(), st.floats(0, 1))
def test_no_cheaper_assignment_has_a_smaller_error(groups: Groups, share: float) -> None:
    budget = 2 * len(groups) + share * 3 * len(groups)
    given_widths = spend(budget, groups)
    chosen = [next(offer for offer in offers if offer.scheme == given_widths[name]) for (name,), offers in groups.items()]
    used = sum(offer.bits for offer in chosen)
    assert used <= budget
    cheapest = min(sum(offer.error for offer in each) for each in product(*groups.values()) if sum(offer.bits for offer in each) <= used)
    assert sum(offer.error for offer in chosen) <= cheapest + 1e-9


def test_an_offer_that_is_dearer_and_no_better_is_never_taken() -> None:
    offers = [Offer(IntegerScheme(weight_bits=width), width, error) for width, error in zip(WIDTHS, (1.0, 1.5, 0.5, 0.5), strict=True)]
    assert spend(3.9, {("a",): offers})["a"].weight_bits == 2
    assert spend(8, {("a",): offers})["a"].weight_bits == 4


def quantized(tiny: Callable, slug: str, change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None):  # type: ignore[no-untyped-def]
    """The model and its checkpoint after `change`, the artifact of `slug` and what the walk said."""
    model, checkpoint = tiny("llama")
    change(checkpoint)
    artifact = type(checkpoint)()
    recipe = parse_recipe(slug)
    calibration = calibration_tokens() if recipe.needs_calibration else None
    return model, checkpoint, artifact, quantize(model.config, checkpoint, recipe, artifact.__setitem__, calibration=calibration)


def logits(model, checkpoint, artifact, slug: str) -> torch.Tensor:  # type: ignore[no-untyped-def]
    loaded = load_model(model.config, parse_recipe(slug), checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="")
    with torch.inference_mode():
        return loaded.model(calibration_tokens().tokens).logits.float()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_mixed_variant_keeps_its_budget_and_loads_as_it_was_given(tiny: Callable, method: str) -> None:
    slug = f"{method}-mix4g32z"
    model, checkpoint, artifact, result = quantized(tiny, slug)
    schemes = {layer.name: layer.scheme for layer in result.layers}
    weights = {name: model.get_submodule(name).weight.numel() for name in schemes}
    stored = {name: int(scheme[1]) + 24 / 32 for name, scheme in schemes.items()}
    assert sum(weights[name] * stored[name] for name in schemes) <= 4 * sum(weights.values())
    assert len(set(schemes.values())) > 1
    for prefix in ("model.layers.0", "model.layers.1"):
        assert len({schemes[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert schemes[f"{prefix}.mlp.gate_proj"] == schemes[f"{prefix}.mlp.up_proj"]
    loaded = load_model(model.config, parse_recipe(slug), checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="")
    found = {name: module.scheme.slug for name, module in loaded.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == schemes


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Memory that nobody wrote to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_the_second_walk_finds_what_the_model_computed_for_itself(tiny: Callable, family: str) -> None:
    model, checkpoint = tiny(family)
    recipe, tokens = parse_recipe("gptq-mix4g32z"), calibration_tokens()
    result = quantize(model.config, checkpoint, recipe, MemoryTensors().__setitem__, calibration=tokens)
    assert max(layer.relative_error for layer in result.layers) < 1, "rotary frequencies and masks of the first walk are still there"


def test_mixed_beats_uniform_at_equal_bits(tiny: Callable) -> None:
    def uneven(checkpoint: dict[str, torch.Tensor]) -> None:
        checkpoint["model.layers.0.mlp.down_proj.weight"] *= 20  # what this block adds outweighs all else
        checkpoint["model.layers.1.self_attn.o_proj.weight"] *= 0.05

    model, checkpoint, uniform, _ = quantized(tiny, "rtn-w3g32z", uneven)
    _, _, mixed, _ = quantized(tiny, "rtn-mix3.75g32z", uneven)  # 3 bits, and 24 for every 32 weights
    assert sum(tensor.nbytes for tensor in mixed.values()) <= sum(tensor.nbytes for tensor in uniform.values())
    exact = logits(model, checkpoint, None, "fp32")
    errors = {
        slug: float((logits(model, checkpoint, artifact, slug) - exact).norm())
        for slug, artifact in (("rtn-w3g32z", uniform), ("rtn-mix3.75g32z", mixed))
    }
    assert errors["rtn-mix3.75g32z"] < 0.7 * errors["rtn-w3g32z"], errors


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_overrides_change_single_layers_and_leave_others_alone(tiny: Callable, method: str) -> None:
    slug = f"{method}-w4g32z-downproj.w8g64z-layers.1.selfattn.bf16"
    model, checkpoint, artifact, result = quantized(tiny, slug)
    schemes = {layer.name: layer.scheme for layer in result.layers}
    assert schemes["model.layers.0.mlp.down_proj"] == "w8g64z" and schemes["model.layers.0.self_attn.q_proj"] == "w4g32z"
    assert not any("layers.1.self_attn" in name for name in schemes)
    error = (logits(model, checkpoint, artifact, slug) - logits(model, checkpoint, None, "bf16")).norm()
    worse = quantized(tiny, f"{method}-w2g32z")[2]
    assert error < 0.5 * (logits(model, checkpoint, worse, f"{method}-w2g32z") - logits(model, checkpoint, None, "bf16")).norm()


def test_an_override_that_fits_no_layer_is_refused(tiny: Callable) -> None:
    with pytest.raises(InvalidInput, match=r"'upproj2\.w8g64z' fits no layer of LlamaForCausalLM.*model\.layers\.0"):
        quantized(tiny, "rtn-w4g32z-upproj2.w8g64z")


def test_layers_that_share_an_input_have_one_format_where_they_are_worked_on_together(tiny: Callable) -> None:
    with pytest.raises(InvalidInput, match=r"q_proj and .*k_proj share an input but are to be w4g32z and w8g32z"):
        quantized(tiny, "gptq-w4g32z-kproj.w8g32z")
    quantized(tiny, "rtn-w4g32z-kproj.w8g32z")


def test_codes_of_no_width_are_refused(tiny: Callable) -> None:
    model, checkpoint, artifact, _ = quantized(tiny, "rtn-mix4g32z")
    artifact["model.layers.0.mlp.up_proj.codes"] = artifact["model.layers.0.mlp.up_proj.codes"][:, :-1].contiguous()
    with pytest.raises(CorruptData, match=r"up_proj\.codes"):
        logits(model, checkpoint, artifact, "rtn-mix4g32z")
