"""Triton's attention over a paged cache against its definition in torch."""

import pytest
import torch

from quantizers.kernels.kv_cache import Plane, quantize_heads
from quantizers.kernels.paged_decode import Attention, paged_decode_reference

LONG = 700  # three pieces of 256 positions


def run(
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    positions: list[int],
    attention: Attention,
    dtype: torch.dtype,
    block: int = 16,
    *,
    coded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By Triton and by the definition; blocks are scattered, and what no sequence has written is NaN."""
    from quantizers.kernels.cuda.paged_decode import paged_decode

    generator = torch.Generator().manual_seed(heads)
    width = -(-(max(positions) + 1) // block)
    tables = torch.randperm(len(positions) * width, generator=generator).view(len(positions), width).to(torch.int32)
    keys, values = (
        torch.randn(tables.numel(), block, kv_heads, dim, generator=generator).to(dtype).clone() for dim in (key_dim, value_dim)
    )
    for table, position in zip(tables.tolist(), positions, strict=True):
        for part in (keys, values):
            part[table[position // block], position % block + 1 :] = float("nan")
            part[table[position // block + 1 :]] = float("nan")
    query = torch.randn(len(positions), heads, key_dim, generator=generator).to(dtype)
    planes = [Plane(*quantize_heads(part)) if coded else Plane(part) for part in (keys, values)]
    arguments = (query, *planes, tables, torch.tensor(positions), attention)
    return paged_decode(*arguments, LONG), paged_decode_reference(*arguments)


@pytest.mark.parametrize(
    "attention", [Attention(0.3), Attention(0.3, 5), Attention(0.3, 300), Attention(1.0, None, 4.0), Attention(1.0, 20, 4.0)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), [(4, 2, 16, 16), (3, 1, 24, 40), (20, 1, 8, 8)])
def test_it_is_the_definition(heads: int, kv_heads: int, key_dim: int, value_dim: int, attention: Attention) -> None:
    y, expected = run(heads, kv_heads, key_dim, value_dim, [0, 17, 599], attention, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 15, 16, 63, 64, 255, 256, 511, 512, 699])
def test_ends_of_blocks_steps_and_pieces(position: int) -> None:
    y, expected = run(2, 1, 16, 16, [position], Attention(0.5), torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_windows_that_begin_at_the_ends_of_pieces() -> None:
    for window in (1, 64, 343, 344, 345):  # the last begin before, at and after position 256
        y, expected = run(2, 1, 16, 16, [599], Attention(0.5, window), torch.float32)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes(dtype: torch.dtype, error: float) -> None:
    y, expected = run(4, 2, 16, 16, [3, 40], Attention(0.3), dtype, block=8)
    assert y.dtype == dtype
    assert ((y.float() - expected.float()).norm() / expected.float().norm()).item() < error


@pytest.mark.parametrize("attention", [Attention(0.3), Attention(1.0, 20, 4.0)])
def test_bytes_with_scales(attention: Attention) -> None:
    y, expected = run(4, 2, 16, 24, [0, 17, 300], attention, torch.float32, coded=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    from quantizers.kernels.cuda.paged_decode import paged_decode

    generator = torch.Generator().manual_seed(9)
    keys, values = (torch.randn(60, 16, 2, 16, generator=generator) for _ in range(2))
    query = torch.randn(2, 4, 16, generator=generator)
    tables = torch.arange(60, dtype=torch.int32).view(2, 30)
    together = paged_decode(query, Plane(keys), Plane(values), tables, torch.tensor([10, 450]), Attention(0.3), LONG)
    alone = paged_decode(query[:1], Plane(keys), Plane(values), tables[:1, :1], torch.tensor([10]), Attention(0.3), LONG)
    assert torch.equal(together[:1], alone)
