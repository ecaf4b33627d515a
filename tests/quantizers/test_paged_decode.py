"""Attention over a paged cache as it is defined, against torch's own attention over each sequence alone, and with sizes only."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quantizers.kernels.kv_cache import Plane, quantize_heads
from quantizers.kernels.paged_decode import Attention, paged_decode, paged_decode_reference


def cache(seed: int, kv_heads: int, key_dim: int, value_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of 12 blocks of 4 positions, and a table of three sequences of which the last columns mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(12, 4, kv_heads, dim, generator=generator) for dim in (key_dim, value_dim))
    return keys, values, torch.tensor([[3, 1, 7, 0], [5, 11, 11, 11], [2, 9, 4, 8]], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_each_sequence_attends_to_its_own_positions(heads: int, kv_heads: int, window: int | None) -> None:
    keys, values, tables = cache(0, kv_heads, 8, 6)
    positions = torch.tensor([9, 0, 15])
    query = torch.randn(3, heads, 8, generator=torch.Generator().manual_seed(1))
    found = paged_decode(query, Plane(keys), Plane(values), tables, positions, Attention(0.3, window), 16)
    for row, position in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, position + 1 - window)
        own_keys, own_values = (
            part[tables[row].long()].flatten(0, 1)[first : position + 1].transpose(0, 1)[None] for part in (keys, values)
        )
        expected = scaled_dot_product_attention(query[row][None, :, None], own_keys, own_values, scale=0.3, enable_gqa=True)[0, :, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


def test_scores_are_capped() -> None:
    keys, values, tables = cache(2, 2, 8, 8)
    query = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(3)) * 9
    positions = torch.tensor([5, 3, 2])
    found = paged_decode(query, Plane(keys), Plane(values), tables, positions, Attention(1.0, None, 2.0), 16)
    for row, position in enumerate(positions.tolist()):
        own_keys, own_values = (part[tables[row].long()].flatten(0, 1)[: position + 1] for part in (keys, values))
        weights = (2 * torch.tanh(torch.einsum("hd,shd->hs", query[row], own_keys) / 2)).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("hs,shd->hd", weights, own_values), rtol=1e-5, atol=1e-6)


def test_what_is_not_seen_may_be_nan() -> None:
    keys, values, tables = cache(4, 1, 8, 8)
    query, positions = torch.randn(3, 1, 8), torch.tensor([5, 1, 2])
    clean = paged_decode(query, Plane(keys), Plane(values), tables, positions, Attention(1.0), 16)
    for part in (keys, values):
        part[1, 2:] = part[5, 2:] = part[11] = part[2, 3] = float("nan")
    assert torch.equal(paged_decode(query, Plane(keys), Plane(values), tables, positions, Attention(1.0), 16), clean)


def test_only_shapes_decide_what_is_computed() -> None:
    """A tensor on the meta device has no values: whoever asked for one would fail here, and wait for a GPU there."""
    keys, values, tables = (part.to("meta") for part in cache(5, 2, 8, 6))
    query, positions = torch.empty(3, 4, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    assert paged_decode(query, Plane(keys), Plane(values), tables, positions, Attention(1.0, 4, 5.0), 16).shape == (3, 4, 6)


def test_bytes_are_read_as_the_numbers_that_they_stand_for() -> None:
    keys, values, tables = cache(7, 2, 8, 6)
    query, positions = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(8)), torch.tensor([9, 0, 15])
    coded = [Plane(*quantize_heads(part)) for part in (keys, values)]
    told = [Plane(codes.numbers.float() * codes.scales[..., None]) for codes in coded if codes.scales is not None]
    attention = Attention(0.3, 7)
    found, expected = (paged_decode(query, *planes, tables, positions, attention, 16) for planes in (coded, told))
    assert torch.equal(found, expected)
    exact = paged_decode(query, Plane(keys), Plane(values), tables, positions, attention, 16)
    assert ((found - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", [Attention(0.1), Attention(0.1, 100), Attention(1.0, None, 30.0)])
def test_a_gpu_attends_as_defined(attention: Attention) -> None:
    generator = torch.Generator("cuda").manual_seed(6)
    keys, values = (torch.randn(400, 16, 8, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(4, 32, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(400, generator=generator, device="cuda").view(4, 100).to(torch.int32)
    arguments = (query, Plane(keys), Plane(values), tables, torch.tensor([0, 77, 800, 1599], device="cuda"), attention)
    y, expected = paged_decode(*arguments, 1600), paged_decode_reference(*arguments)
    assert ((y.float() - expected.float()).norm() / expected.float().norm()).item() < 1e-2  # bf16 weights of the values, and one rounding
