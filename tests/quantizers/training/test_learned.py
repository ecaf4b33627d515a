"""Gradients through quantization: straight through inside the range, none outside, the scale's against finite differences."""

from itertools import product

import pytest
import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed
from quantizers.grid import as_groups, range_grid
from quantizers.scheme import IntegerScheme, parse_scheme
from quantizers.training.learned import LearnedWeight, fake_quantize

FP16 = 2**-10  # of a value: scales and minimums are stored in it

SLUGS = [f"w{bits}g32{zero}" for bits, zero in product("234", ("", "z", "m"))]


def scheme_of(slug: str) -> IntegerScheme:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme)
    return scheme


def case(slug: str) -> tuple[Tensor, Tensor, Tensor | None, IntegerScheme]:
    """fp64 weights on a grid that covers half of their range, so that some lie outside on both sides."""
    scheme = scheme_of(slug)
    weight = torch.randn(6, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = (weight.amax(-1, keepdim=True) - weight.amin(-1, keepdim=True)) / (2 * (scheme.qmax - scheme.qmin))
    zeros = {"none": None, "integer": torch.full_like(scale, scheme.qmax / 2 + 0.3), "minimum": weight.amin(-1, keepdim=True) / 2}
    return weight, scale, zeros[scheme.zero], scheme


def position(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: IntegerScheme) -> Tensor:
    """In codes, before rounding and clamping."""
    if scheme.zero == "minimum":
        return (weight - zero) / scale
    return weight / scale if zero is None else weight / scale + zero.round()


@pytest.mark.parametrize("slug", SLUGS)
def test_weights_inside_the_range_get_the_whole_gradient_and_others_none(slug: str) -> None:
    weight, scale, zero, scheme = case(slug)
    weight.requires_grad_()
    incoming = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fake_quantize(weight, scale, zero, scheme).backward(incoming)
    codes = position(weight.detach(), scale, zero, scheme).round()
    inside = (codes >= scheme.qmin) & (codes <= scheme.qmax)
    assert 0 < int((~inside).sum()) < inside.numel() / 2
    assert torch.allclose(weight.grad[inside], incoming[inside]) and not weight.grad[~inside].any()


def surrogate(weight: Tensor, scale: Tensor, zero: Tensor | None, at: tuple[Tensor, Tensor | None], scheme: IntegerScheme) -> Tensor:
    """What straight-through gradients are the true gradients of: what rounding added at `at` (scale, zero), and which codes were clamped
    there, stays as it was.
    """
    place = position(weight, *at, scheme)
    shift = zero
    if scheme.zero == "integer":
        shift = zero + (at[1].round() - at[1])
        now = weight / scale + shift
    else:
        now = weight / scale if zero is None else (weight - zero) / scale
    codes = now + (place.round() - place)
    codes = torch.where(place.round() < scheme.qmin, scheme.qmin, torch.where(place.round() > scheme.qmax, scheme.qmax, codes))
    if scheme.zero == "minimum":
        return codes * scale + shift
    return codes * scale if zero is None else (codes - shift) * scale


@pytest.mark.parametrize("slug", SLUGS)
def test_gradients_of_scale_and_zero_are_the_surrogates_finite_differences(slug: str) -> None:
    weight, scale, zero, scheme = case(slug)
    incoming = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [leaf.clone().requires_grad_() for leaf in ([scale] if zero is None else [scale, zero])]
    value = fake_quantize(weight, leaves[0], None if zero is None else leaves[1], scheme)
    assert torch.allclose(value.detach(), surrogate(weight, scale, zero, (scale, zero), scheme))
    value.backward(incoming)
    step = 1e-7
    for index, leaf in enumerate(leaves):

        def moved(by: float, index: int = index) -> Tensor:
            new = (scale + by * (index == 0), None if zero is None else zero + by * (index == 1))
            return (surrogate(weight, *new, (scale, zero), scheme) * incoming).sum(-1, keepdim=True)

        assert torch.allclose(leaf.grad, (moved(step) - moved(-step)) / (2 * step), atol=1e-5)


@pytest.mark.parametrize("slug", [*SLUGS, "w8", "w8g64z"])
def test_it_begins_at_the_grid_and_ends_in_what_it_computed_with(slug: str) -> None:
    weight, scheme = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), scheme_of(slug)
    grouped = as_groups(weight, scheme, "layer")
    grid = range_grid(grouped, scheme, "layer")
    learned = LearnedWeight(weight, grid, "layer")
    assert torch.allclose(learned().detach(), grid.weight(grid.codes(grouped).view(8, 64)).dequantize(), atol=1e-6)
    with torch.no_grad():
        learned.weight += 0.01
        learned.scale *= 1.03
        if learned.zero is not None:
            learned.zero += 0.4 if scheme.zero == "integer" else 0.02
    difference = (learned.quantized().dequantize() - learned().detach()).abs()
    # A scale that is rounded to fp16 moves a weight in the middle between two codes by a whole step, so a few may differ by one.
    near = difference <= 2 * FP16 * learned().detach().abs() + FP16 * float(weight.abs().max())
    assert near.float().mean() > 0.95 and bool((difference <= 1.1 * float(learned.scale.detach().max())).all())


def test_numbers_that_cannot_be_stored_fail_by_name() -> None:
    weight, scheme = torch.randn(2, 64), scheme_of("w4g32")
    learned = LearnedWeight(weight, range_grid(as_groups(weight, scheme, "layer"), scheme, "layer"), "blocks.1.up")
    with torch.no_grad():
        learned.scale.fill_(1e6)
    with pytest.raises(QuantizationFailed, match=r"^blocks\.1\.up: .*beyond fp16"):
        learned.quantized()
