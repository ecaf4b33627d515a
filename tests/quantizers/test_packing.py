"""Packed codes: a dense stream, lowest bits first, that every reader of compressed-tensors' format unpacks."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from quantizers.packing import pack, packed_width, unpack

BITS = (2, 3, 4, 8)


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack_at_every_width(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [32, 96, 7, 33])
def test_bytes_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    """Its words are little-endian int32 padded with zero bits, its codes signed: the same stream up to the last word's padding."""
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8)
    words = pack_to_int32((codes.int() - (1 << (bits - 1))).to(torch.int8), bits)
    stream = words.view(torch.uint8)
    assert torch.equal(pack(codes, bits), stream[:, : packed_width(columns, bits)])
    assert not stream[:, packed_width(columns, bits) :].any()


def test_three_bits_worked_by_hand() -> None:
    # 1 | 2<<3 | 3<<6 | 4<<9 | 5<<12 | 6<<15 | 7<<18 | 0<<21 = 0x1F58D1
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3).tolist() == [[0xD1, 0x58, 0x1F]]


def test_what_is_left_of_the_last_byte_is_zero() -> None:
    assert pack(torch.full((1, 3), 7, dtype=torch.uint8), 3).tolist() == [[0xFF, 0x01]]
