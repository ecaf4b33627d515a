"""HQQ against its equations written out plainly, its promise (less lost than by rounding at 3 bits, without data), and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from quantizers.errors import QuantizationFailed, UnknownRecipe, UnsupportedScheme
from quantizers.methods.hqq import Hqq, column_importance
from quantizers.methods.rtn import quantize_nearest
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import IntegerScheme, parse_scheme
from quantizers.tensors import TensorSource
from tests.quantizers.conftest import MemoryTensors
from tests.quantizers.test_gptq import with_weights

FP16_ROUNDING = 1.01  # of an error: the solver works with real scales, the stored ones are rounded


def scheme_of(slug: str) -> IntegerScheme:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme)
    return scheme


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights as a network's are: mostly small, a few far out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    far = torch.rand(rows, columns, generator=generator) < 0.01
    return torch.where(far, weight * 6, weight)


def plain_hqq(group: Tensor, bits: int, method: Hqq) -> float:
    """The original's loop for one group in fp64, as it is published: scale 1 / s', zero point z in units of codes, the scale fixed.

    Least squared error of all iterates up to the first that is not better.
    """
    group = group.double()
    inverse = (2**bits - 1) / (group.max() - group.min())
    zero, beta, least = -group.min() * inverse, method.beta, float("inf")
    for _ in range(method.iterations + 1):
        codes = (group * inverse + zero).round().clamp(0, 2**bits - 1)
        error = group - (codes - zero) / inverse
        loss = float(error.square().sum())
        if not loss < least:
            break
        least = loss
        steps = error * inverse
        shrunk = steps.sign() * (steps.abs() - steps.abs() ** (method.lp_norm - 1) / beta).clamp(min=0)
        zero = (codes - (group * inverse - shrunk)).mean()
        beta *= method.kappa
    return least


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("beta", [1, 10, 100])
def test_without_balance_and_clipping_it_is_the_published_loop(bits: int, beta: int) -> None:
    method = Hqq(beta=beta, clip=False, balance=False)
    weight = heavy_tailed(12, 128)
    ours = (method.quantize(weight, scheme_of(f"w{bits}g64m"), layer="layer").dequantize() - weight).view(-1, 64).square().sum(-1)
    theirs = torch.tensor([plain_hqq(group, bits, method) for group in weight.view(-1, 64)])
    assert torch.allclose(ours, theirs.float(), rtol=0.02)  # fp16 scales and minimums, fp32 arithmetic


@pytest.mark.parametrize("slug", ["w2g32m", "w3g64m", "w4g128m", "w8m"])
@pytest.mark.parametrize("lp_norm", [0.5, 0.7, 1.0])
def test_no_group_is_worse_than_by_its_range(slug: str, lp_norm: float) -> None:
    weight, scheme = heavy_tailed(24, 256), scheme_of(slug)
    ours = Hqq(lp_norm=lp_norm, balance=False).quantize(weight, scheme, layer="layer").dequantize()
    rounded = quantize_nearest(weight, scheme, layer="layer").dequantize()
    errors = [(each - weight).view(24, -1, scheme.group_size or 256).square().sum(-1) for each in (ours, rounded)]
    assert bool((errors[0] <= errors[1] * FP16_ROUNDING).all())
    if scheme.weight_bits < 4:
        assert errors[0].sum() < 0.9 * errors[1].sum()


def test_a_factor_between_a_column_and_its_input_costs_less_where_errors_are_balanced() -> None:
    """The same function, its columns times a factor and its inputs over it: counted as they are, small columns are neglected."""
    weight, x = heavy_tailed(64, 128), torch.randn(256, 128, generator=torch.Generator().manual_seed(4))
    factors = torch.logspace(-0.7, 0.7, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(5))]
    lost = {}
    for balance in (True, False):
        quantized = Hqq(balance=balance).quantize(weight * factors, scheme_of("w3g64m"), layer="layer").dequantize()
        lost[balance] = float(((x / factors) @ (quantized - weight * factors).T).norm() / (x @ weight.T).norm())
    assert lost[True] < 0.95 * lost[False]


def test_importance_is_the_inverse_mean_square_and_bounded() -> None:
    weight = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    importance = column_importance(weight)
    assert importance[1] / importance[0] == pytest.approx(9)
    assert importance[2] == pytest.approx(1000), "a thousandth of the mean square at the least"
    assert bool(torch.isfinite(column_importance(torch.zeros(2, 3))).all())


@pytest.fixture
def first_blocks(demo_config: PretrainedConfig, demo_tensors: TensorSource) -> tuple[PretrainedConfig, MemoryTensors]:
    """The demo model cut after two of its blocks: real weights, seconds of work."""
    config = type(demo_config).from_dict(demo_config.to_dict() | {"num_hidden_layers": 2})
    later = tuple(f"model.layers.{index}." for index in range(2, demo_config.num_hidden_layers))
    names = [name for name in demo_tensors.keys() if not name.startswith(later)]  # noqa: SIM118
    return config, MemoryTensors({name: demo_tensors.get(name) for name in names})


def test_three_bits_lose_less_than_by_rounding(first_blocks: tuple[PretrainedConfig, MemoryTensors]) -> None:
    config, checkpoint = first_blocks
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(checkpoint, strict=False)
    model.tie_weights()
    tokens = torch.arange(200, 600)[None]
    with torch.no_grad():
        expected = torch.log_softmax(model(tokens).logits[0], -1)
    divergence = {}
    for slug in ("rtn-w3g64m", "hqq-w3g64m"):
        sink, recipe = MemoryTensors(), parse_recipe(slug)
        result = quantize(config, checkpoint, recipe, sink.__setitem__)
        got = torch.log_softmax(with_weights(model, result, sink, recipe)(tokens).logits[0], -1)
        divergence[slug] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence["hqq-w3g64m"] < 0.9 * divergence["rtn-w3g64m"]


def test_every_family_runs(family: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    result = quantize(model.config, checkpoint, parse_recipe("hqq-w4g32m"), MemoryTensors().__setitem__)
    assert max(layer.relative_error for layer in result.layers) < 0.1


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_groups_of_one_value_are_kept(value: float) -> None:
    weight = torch.full((4, 64), value)
    weight[1, :32] = torch.linspace(-1, 1, 32)
    quantized = Hqq().quantize(weight, scheme_of("w3g32m"), layer="layer").dequantize()
    assert (quantized - weight)[0].abs().max() < 1e-3 and bool(torch.isfinite(quantized).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_fail_with_the_layers_name(bad: float) -> None:
    weight = heavy_tailed(4, 64)
    weight[2, 3] = bad
    with pytest.raises(QuantizationFailed, match=r"^blocks\.3\.q_proj: .*NaN or infinity"):
        Hqq().quantize(weight, scheme_of("w3g64m"), layer="blocks.3.q_proj")


def test_shapes_and_numbers_that_do_not_fit_fail_by_name() -> None:
    with pytest.raises(QuantizationFailed, match=r"^proj: its 576 inputs .* choose g32, g64"):
        Hqq().quantize(heavy_tailed(4, 576), scheme_of("w3g128m"), layer="proj")
    with pytest.raises(QuantizationFailed, match=r"^proj: .* beyond fp16"):
        Hqq().quantize(heavy_tailed(4, 64) * 1e7, scheme_of("w3g64m"), layer="proj")


@pytest.mark.parametrize("slug", ["hqq-w4g64", "hqq-w4g64z", "hqq-nf4", "hqq-w8a8"])
def test_formats_that_it_cannot_make_are_refused(slug: str) -> None:
    with pytest.raises(UnsupportedScheme, match="hqq makes weight-only integer formats with a real minimum such as w4g64m"):
        parse_recipe(slug)


@pytest.mark.parametrize("options", ["lpnorm2", "lpnorm0", "beta0", "kappa0.5", "iterations0", "clipmaybe", "zero1"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(UnknownRecipe, match="hqq"):
        parse_recipe(f"hqq.{options}-w3g64m")
