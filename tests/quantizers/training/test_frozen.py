"""Scales over settled codes: they compute what is stored, learn by the exact gradient, and are stored again; products in a quick type."""

import pytest
import torch
from torch.nn.functional import linear

from quantizers.grid import as_groups, range_grid
from quantizers.scheme import IntegerScheme, parse_scheme
from quantizers.training.frozen import FrozenCodes
from quantizers.training.product import product, quick_dtype
from quantizers.weights import QuantizedWeight

BF16 = 2**-8  # of a value, each factor and the result rounded


def quantized(slug: str) -> QuantizedWeight:
    scheme = parse_scheme(slug)
    assert isinstance(scheme, IntegerScheme)
    grouped = as_groups(torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), scheme, "layer")
    grid = range_grid(grouped, scheme, "layer")
    return grid.weight(grid.codes(grouped).flatten(1))


@pytest.mark.parametrize("slug", ["w2g32", "w2g32z", "w3g32m", "w4", "w8", "w8g64z"])
def test_it_computes_what_is_stored_and_stores_what_it_computed(slug: str) -> None:
    weight = quantized(slug)
    frozen = FrozenCodes(weight, "layer")
    assert torch.allclose(frozen().detach(), weight.dequantize(), rtol=1e-6, atol=1e-7)
    same = frozen.quantized()
    assert all(torch.equal(same.tensors[name], weight.tensors[name]) for name in weight.tensors)
    with torch.no_grad():
        for leaf in frozen.leaves().values():
            leaf.mul_(1.25)
    changed = frozen.quantized()
    assert torch.allclose(frozen().detach(), changed.dequantize(), rtol=0, atol=2**-10 * float(changed.dequantize().abs().max()))
    assert all(torch.equal(changed.tensors[name], weight.tensors[name]) for name in weight.tensors.keys() & {"codes", "zero_point"})


@pytest.mark.parametrize("slug", ["w2g32", "w2g32z", "w3g32m"])
def test_the_gradient_is_the_finite_difference(slug: str) -> None:
    """What is computed is linear in scale and minimum, so a large step is exact."""
    frozen = FrozenCodes(quantized(slug), "layer")
    incoming = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    frozen().backward(incoming)
    for leaf in frozen.leaves().values():
        with torch.no_grad():
            low = (frozen() * incoming).view(6, 2, 32).sum(-1, keepdim=True)
            leaf += 1
            high = (frozen() * incoming).view(6, 2, 32).sum(-1, keepdim=True)
            leaf -= 1
        assert torch.allclose(leaf.grad, high - low, atol=1e-4)


def test_products_are_the_linear_layers_within_the_quick_type() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(2, 7, 64, generator=generator).requires_grad_(), torch.randn(9, 64, generator=generator).requires_grad_()
    incoming = torch.randn(2, 7, 9, generator=generator)
    ours = product(x, weight)
    assert ours.dtype == torch.float32
    found = torch.autograd.grad(ours, (x, weight), incoming)
    theirs = linear(x, weight)
    expected = torch.autograd.grad(theirs, (x, weight), incoming)
    error = BF16 if quick_dtype(x.device) == torch.bfloat16 else 1e-6
    for got, wanted in zip((ours.detach(), *found), (theirs.detach(), *expected), strict=True):
        assert got.dtype == torch.float32 and 0 <= float((got - wanted).norm()) <= error * float(wanted.norm())
