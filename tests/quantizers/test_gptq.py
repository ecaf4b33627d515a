"""GPTQ against the paper's equations written out plainly, its promise (less output error than rounding), and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed, UnsupportedScheme
from quantizers.experts import take_apart
from quantizers.grid import as_groups, range_grid
from quantizers.hessian import factors, gram
from quantizers.methods.gptq import Gptq, compensated_codes, corrected
from quantizers.methods.rtn import quantize_nearest
from quantizers.pipeline import quantize
from quantizers.recipe import Recipe, parse_recipe
from quantizers.scheme import IntegerScheme, parse_scheme
from tests.quantizers.conftest import DECODERS, MemoryTensors, calibration_tokens


def scheme_of(slug: str) -> IntegerScheme:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme)
    return scheme


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs as a network's are: correlated, a few channels much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5
    return mixed * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]


def weight_of(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def plain_gptq(weight: Tensor, hessian: Tensor, scheme: IntegerScheme, order: list[int]) -> Tensor:
    """Frantar et al. 2023, equations 2 and 3, in fp64: round a column, move the rest by its error over the inverse Hessian of the columns
    that are left, which is then computed anew. fp32 codes [out, in] on the grid of the original weight."""
    grid = range_grid(as_groups(weight, scheme, "layer"), scheme, "layer")
    size = weight.shape[1] // grid.scale.shape[1]
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = torch.linalg.inv(hessian.double()[rest][:, rest])
        scale, base = grid.scale[:, column // size].double(), grid.base[:, column // size].double()
        codes[:, column] = ((left[:, column] - base) / scale).clamp(scheme.qmin, scheme.qmax).round().float()
        error = (left[:, column] - (codes[:, column] * scale + base)) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0][None]
    return codes


@pytest.mark.parametrize("slug", ["w4g32", "w3g32z", "w2g64m", "w8"])
@pytest.mark.parametrize("by_magnitude", [True, False])
@pytest.mark.parametrize("block_size", [7, 128])
def test_codes_are_the_papers(slug: str, by_magnitude: bool, block_size: int) -> None:
    scheme, weight, damping = scheme_of(slug), weight_of(24, 64), 0.01
    hessian = gram(correlated(400, 64))
    found = factors(hessian, damping=damping, by_magnitude=by_magnitude, layer="layer")
    ours = compensated_codes(weight, range_grid(as_groups(weight, scheme, "layer"), scheme, "layer"), found, block_size)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(64)
    order = hessian.diagonal().argsort(descending=True).tolist() if by_magnitude else list(range(64))
    theirs = plain_gptq(weight, damped, scheme, order)
    # A column in fp32 that lies within rounding of the middle between two codes may fall to the other side, and its row then differs.
    assert (ours == theirs).all(1).float().mean() > 0.9


@pytest.mark.parametrize("slug", ["w4g32", "w3g32z", "w2g32m"])
def test_independent_inputs_leave_rounding(slug: str) -> None:
    """With a diagonal Hessian there is nothing to correct with: the codes are the nearest ones."""
    scheme, weight = scheme_of(slug), weight_of(16, 64)
    grouped = as_groups(weight, scheme, "layer")
    grid = range_grid(grouped, scheme, "layer")
    found = factors(torch.eye(64), damping=0.01, by_magnitude=True, layer="layer")
    assert torch.equal(compensated_codes(weight, grid, found, 128), grid.codes(grouped).view(weight.shape))


@pytest.mark.parametrize("slug", ["w4g32", "w3g32z", "w2g64m"])
def test_outputs_are_nearer_than_rounded_ones(slug: str) -> None:
    scheme, weight = scheme_of(slug), weight_of(48, 64)
    x, unseen = correlated(900, 64).split([600, 300])
    grid = range_grid(as_groups(weight, scheme, "layer"), scheme, "layer")
    found = factors(gram(x), damping=0.01, by_magnitude=True, layer="layer")
    ours = grid.weight(compensated_codes(weight, grid, found, 128)).dequantize()
    rounded = quantize_nearest(weight, scheme, layer="layer").dequantize()
    for tokens in (x, unseen):
        assert (tokens @ (ours - weight).T).norm() < 0.8 * (tokens @ (rounded - weight).T).norm()


def test_the_correction_is_least_squares() -> None:
    """Without damping W X X'^T (X' X'^T)^-1 is the solution that an independent solver finds; where the inputs agree it is W."""
    weight, full = weight_of(8, 32), correlated(500, 32)
    quantized = full + 0.1 * full.std() * torch.randn(500, 32, generator=torch.Generator().manual_seed(5))
    found = factors(gram(quantized), damping=1e-6, by_magnitude=True, layer="layer")
    ours = corrected(weight, gram(full, quantized), found)
    theirs = torch.linalg.lstsq(quantized.double(), (full @ weight.T).double()).solution.T
    assert torch.allclose(ours.double(), theirs, atol=1e-3)
    found = factors(gram(full), damping=0.01, by_magnitude=False, layer="layer")
    assert torch.allclose(corrected(weight, gram(full), found), weight, atol=1e-4)


def test_inputs_that_were_always_zero_get_weights_of_zero(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    norm = checkpoint["model.layers.0.input_layernorm.weight"] = checkpoint["model.layers.0.input_layernorm.weight"].clone()
    norm[[3, 40]] = 0
    sink = MemoryTensors()
    quantize(model.config, checkpoint, parse_recipe("gptq-w8g32z"), sink.__setitem__, calibration=calibration_tokens())
    scale, zero = (sink[f"model.layers.0.self_attn.q_proj.{name}"].float() for name in ("scale", "zero_point"))
    codes = sink["model.layers.0.self_attn.q_proj.codes"].float()
    assert torch.equal(codes[:, [3, 40]], zero[:, [0, 1]]) and scale.min() > 0


def test_damping_grows_where_it_must_and_gives_up_by_name() -> None:
    singular = torch.ones(8, 8)
    assert factors(singular, damping=1e-12, by_magnitude=True, layer="layer").ridge >= 1e-12
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 30
    with pytest.raises(
        QuantizationFailed, match=r"^blocks\.2\.q_proj: the Hessian .* not positive definite, damped with up to 1 .* or use rtn"
    ):
        factors(indefinite, damping=0.01, by_magnitude=True, layer="blocks.2.q_proj")
    barely = torch.eye(8)
    barely[0, 1] = barely[1, 0] = 1.1
    assert factors(barely, damping=0.01, by_magnitude=True, layer="layer").ridge == pytest.approx(0.16), "0.01 and 0.04 are too little"


@pytest.mark.parametrize(
    ("hessian", "message"), [(torch.full((4, 4), float("nan")), "are not finite"), (torch.zeros(4, 4), "calibration tokens are zero")]
)
def test_statistics_that_say_nothing_fail_by_name(hessian: Tensor, message: str) -> None:
    with pytest.raises(QuantizationFailed, match=message) as failure:
        factors(hessian, damping=0.01, by_magnitude=True, layer="blocks.2.q_proj")
    assert failure.value.layer == "blocks.2.q_proj"


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_nearer_than_rounding(family: str, tiny: Callable) -> None:
    """Three bits, logits on the tokens that it was calibrated on: the whole walk, in transformers' own model with the weights put in."""
    model, checkpoint = tiny(family)
    take_apart(model)
    calibration = calibration_tokens(16, 48)
    with torch.no_grad():
        expected = model(calibration.tokens).logits
    errors = {}
    for slug in ("rtn-w3g32", "gptq-w3g32"):
        recipe = parse_recipe(slug)
        sink = MemoryTensors()
        given = calibration if slug.startswith("gptq") else None
        result = quantize(model.config, checkpoint, recipe, sink.__setitem__, calibration=given)
        errors[slug] = (with_weights(model, result, sink, recipe)(calibration.tokens).logits - expected).norm().item()
    assert errors["gptq-w3g32"] < 0.85 * errors["rtn-w3g32"]


def with_weights(model: torch.nn.Module, result: object, sink: MemoryTensors, recipe: Recipe) -> torch.nn.Module:
    """A copy of `model` that has the dequantized weights of the artifact."""
    import copy

    from transformers.pytorch_utils import Conv1D

    from quantizers.weights import QuantizedWeight, tensor_specs

    model = copy.deepcopy(model).requires_grad_(False)
    for found in result.layers:  # type: ignore[attr-defined]
        layer = model.get_submodule(found.name)
        rows, columns = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        specs = tensor_specs(recipe.scheme, rows, columns)  # type: ignore[arg-type]
        tensors = {name: sink[f"{found.name}.{name}"] for name in specs}
        weight = QuantizedWeight(recipe.scheme, rows, columns, tensors).dequantize()  # type: ignore[arg-type]
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)
    return model


@pytest.mark.parametrize("slug", ["gptq-nf4", "gptq-mxfp4"])
def test_formats_that_it_cannot_make_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match="gptq"):
        parse_recipe(slug)


def test_both_targets_and_any_block_size_run(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    sinks = []
    for options in ({"block_size": 5}, {"block_size": 64}, {"target": "quantized"}):
        recipe = Recipe(methods=(Gptq(**options),), scheme=scheme_of("w4g32"))
        sinks.append(MemoryTensors())
        quantize(model.config, checkpoint, recipe, sinks[-1].__setitem__, calibration=calibration_tokens())
    name = "model.layers.0.self_attn.q_proj.codes"  # the first layer: later ones see rounding differences of the ones before
    assert (sinks[0][name] == sinks[1][name]).float().mean() > 0.99
    assert not torch.equal(sinks[0]["model.layers.1.mlp.down_proj.codes"], sinks[2]["model.layers.1.mlp.down_proj.codes"])
