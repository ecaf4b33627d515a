"""Weights whose codes are settled, and whose scales still learn (EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.3)."""

import torch
from torch import Tensor

from quantizers.grid import grid_of, learned_grid
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight


class FrozenCodes:
    """One layer. Codes and integer zero points stay; `scale` and, where the format has one, `minimum` are fp32 leaves [out, G, 1]."""

    def __init__(self, weight: QuantizedWeight, layer: str) -> None:
        assert isinstance(weight.scheme, IntegerScheme), "checked by the recipe"
        self.scheme, self._layer = weight.scheme, layer
        self._grid = grid_of(weight)
        grouped = weight.dequantize().view(*self._grid.scale.shape, -1)
        codes = self._grid.codes(grouped)  # of the format's own range, signed or not
        if self._grid.zero_point is not None:
            codes = codes - self._grid.zero_point.float().unsqueeze(-1)
        self._steps = codes.to(torch.int16)  # from the value 0, or from the minimum
        self.scale = self._grid.scale.float().unsqueeze(-1).requires_grad_()
        self.minimum = None if self._grid.minimum is None else self._grid.minimum.float().unsqueeze(-1).requires_grad_()

    def __call__(self) -> Tensor:
        """fp32 [out, in]."""
        values = self._steps.float() * self.scale
        return (values if self.minimum is None else values + self.minimum).flatten(1)

    def leaves(self) -> dict[str, Tensor]:
        """What learns, by name."""
        return {"scale": self.scale} | ({} if self.minimum is None else {"minimum": self.minimum})

    def quantized(self) -> QuantizedWeight:
        """With the leaves as they are now, in fp16. Raises QuantizationFailed naming the layer."""
        point = self._grid.zero_point
        zero = point if self.minimum is None else self.minimum.detach().squeeze(-1)
        grid = learned_grid(self.scale.detach().squeeze(-1), None if zero is None else zero.float(), self.scheme, self._layer)
        codes = self._steps.float() if point is None else self._steps + point.float().unsqueeze(-1)
        return grid.weight(codes.flatten(1))
