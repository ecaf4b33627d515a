"""Weights that are rounded to nearest in every forward pass, on the grid over the range that their groups have by then, and learn through
it (Liu et al. 2023, LLM-QAT, arXiv 2305.17888, section 2.2: the range is not clipped, since weights far out matter).
"""

import torch
from torch import Tensor

from quantizers.grid import as_groups, range_grid
from quantizers.methods.rtn import quantize_nearest
from quantizers.scheme import IntegerScheme
from quantizers.training.learned import fake_quantize
from quantizers.weights import QuantizedWeight


class RangedWeight:
    """One layer; `weight` is an fp32 leaf [out, in]."""

    def __init__(self, weight: Tensor, scheme: IntegerScheme, layer: str) -> None:
        """Begins at `weight` [out, in], which is not changed."""
        self.scheme, self._layer = scheme, layer
        self.weight = weight.detach().float().clone().requires_grad_()

    def __call__(self) -> Tensor:
        """fp32 [out, in]: what the codes of the weight as it is now stand for. Its range has no gradient."""
        weight = self.floating()
        with torch.no_grad():
            grid = range_grid(as_groups(weight.detach(), self.scheme, self._layer), self.scheme, self._layer)
        zero = grid.zero_point if grid.zero_point is not None else grid.minimum
        scale, zero = grid.scale.float().unsqueeze(-1), None if zero is None else zero.float().unsqueeze(-1)
        return fake_quantize(weight.view(*grid.scale.shape, -1), scale, zero, self.scheme).flatten(1)

    def floating(self) -> Tensor:
        """fp32 [out, in], before rounding."""
        return self.weight

    def leaves(self) -> dict[str, Tensor]:
        """What learns, by name."""
        return {"weight": self.weight}

    def quantized(self) -> QuantizedWeight:
        """Rounded for good. Raises QuantizationFailed naming the layer."""
        return quantize_nearest(self.floating().detach(), self.scheme, layer=self._layer)


class AdaptedWeight(RangedWeight):
    """The weight stays and a product of low rank learns, which is added before rounding: w + up down (Hu et al. 2021, LoRA, arXiv
    2106.09685, equation 3). `down` fp32 [rank, in] begins small and random, `up` fp32 [out, rank] at zero, so that training begins at w.
    """

    def __init__(self, weight: Tensor, scheme: IntegerScheme, layer: str, rank: int) -> None:
        super().__init__(weight, scheme, layer)
        self.weight.requires_grad_(False)
        rows, columns = weight.shape
        generator = torch.Generator(device=weight.device).manual_seed(0)
        self.down = torch.randn(rank, columns, device=weight.device, generator=generator).div_(columns**0.5).requires_grad_()
        self.up = torch.zeros(rows, rank, device=weight.device).requires_grad_()

    def floating(self) -> Tensor:
        return torch.addmm(self.weight, self.up, self.down)

    def leaves(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}
