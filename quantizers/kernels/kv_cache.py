"""Keys, or values, of one layer of a paged cache in torch: as the model computes them, or as bytes with a scale for each position and head.

Bytes: x = code * scale with whole codes in [-127, 127] and scale = max |x| / 127 over the head, in fp32. This is the reference of what the
native cache holds (`cpu/native/attention8.inc`), to the bit.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_LARGEST = 127.0
_TINIEST = 2.0**-126  # of a scale: a head of zeros is divided by it


@dataclass(frozen=True)
class Plane:
    """`numbers` [blocks, block_size, kv_heads, dim]; in int8 with `scales` fp32 [blocks, block_size, kv_heads], else without."""

    numbers: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(cls, blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Self:
        """`dtype` is a floating type, or int8."""
        numbers = torch.zeros(blocks, block_size, kv_heads, dim, dtype=dtype, device=device)
        return cls(numbers, torch.zeros(blocks, block_size, kv_heads, device=device) if dtype == torch.int8 else None)

    @staticmethod
    def bytes_per_position(kv_heads: int, dim: int, dtype: torch.dtype) -> int:
        return kv_heads * (dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return (self.numbers,) if self.scales is None else (self.numbers, self.scales)

    def write(self, slots: Tensor, new: Tensor) -> None:
        """Put `new` [T, kv_heads, dim] into `slots` int64 [T], which count positions over all blocks."""
        parts: tuple[Tensor, ...] = (new.to(self.numbers.dtype),) if self.scales is None else quantize_heads(new)
        for own, values in zip(self._parts, parts, strict=True):
            own.flatten(0, 1).index_copy_(0, slots, values)

    def clear(self, blocks: Tensor) -> None:
        """Zeros in `blocks` int64 [n]."""
        for part in self._parts:
            part.index_fill_(0, blocks, 0)

    def copy(self, source: int, target: int) -> None:
        """Make block `target` what `source` is."""
        for part in self._parts:
            part[target] = part[source]

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """`dtype` [*blocks.shape, block_size, kv_heads, dim] of `blocks`, integers of any shape."""
        numbers = self.numbers[blocks]
        if self.scales is None:
            return numbers.to(dtype)
        return (numbers.float() * self.scales[blocks][..., None]).to(dtype)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales fp32 [..., ] of `x` [..., dim]. NaN and infinity cannot be coded: the scale of their head is NaN."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    usable = largest.isfinite()
    scales = torch.where(usable, (largest / _LARGEST).clamp(min=_TINIEST), torch.nan)
    codes = torch.where(usable[..., None], wide / scales[..., None], 0.0).round().clamp(-_LARGEST, _LARGEST)
    return codes.to(torch.int8), scales
