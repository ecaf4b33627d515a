"""HQQ, half-quadratic quantization (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): the zero of a
group of weights from the weights alone.

The minimum m of the grid w ~ s q + m and an estimate e of what outliers lose are found in turns: min over m and e of
||e||_p^p + beta/2 ||w - (s q + m) - e||^2 with codes q = round((w - m) / s). For e that is a shrinkage, for m a mean. Three things are not
the original's: errors of an input are divided by the root mean square of its column, every group keeps its own best iterate, and at 2
and 3 bits every group also tries shrunken ranges.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import FP32_BYTES, LayerGroups, Method
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.grid import Grid
    from quantizers.weights import QuantizedWeight

# Of a group's range, by bits: a finer step for most weights against outliers that are cut off. Cutting pays where steps are coarse; with
# more of it, or a scale fitted by least squares, the first blocks of a model lose more by their outliers than all others gain.
RANGES = {2: (1.0, 0.9, 0.8), 3: (1.0, 0.9), 4: (1.0,), 8: (1.0,)}
_LEAST_SHARE = 1e-3  # of the mean square of a column: a column of zeros must not decide over its whole group
_SMALLEST = 2.0**-24  # fp16's smallest number, as the step of a group whose weights are all the same
_WEIGHTS = 3 << 15  # solved at once: they and what is made of them stay near the caches


class Hqq(Method):
    """HQQ.

    lp_norm: the p of the norm that outliers are counted in. beta: how closely the estimate of their loss must follow it, with errors in
    units of the group's step (1: an outlier is off by more than a step), multiplied by kappa in each of the iterations.
    balance: count an error relative to the root mean square of its column, so that a factor moved between a column and what feeds it,
    which changes nothing in the model, costs nothing here. clip: try shrunken ranges at 2 and 3 bits.
    """

    name: Literal["hqq"] = "hqq"
    summary: ClassVar[str] = "Round to nearest on a grid whose zero is fitted to the weights of its group; no data, seconds."
    lp_norm: float = Field(default=0.7, gt=0, le=1, allow_inf_nan=False)
    beta: float = Field(default=1, gt=0, le=1e6, allow_inf_nan=False)
    kappa: float = Field(default=1.01, ge=1, le=10, allow_inf_nan=False)
    iterations: int = Field(default=20, ge=1, le=1000)
    balance: bool = True
    clip: bool = True

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme) or scheme.zero != "minimum" or scheme.activation_bits:
            raise UnsupportedScheme(
                f"hqq makes weight-only integer formats with a real minimum such as w4g64m or w3g64m, not {scheme.slug}", param="model"
            )

    def scratch_bytes(self, groups: LayerGroups) -> int:
        """Beside what rounding takes, a piece with what was best, what is tried and their errors."""
        return super().scratch_bytes(groups) + 13 * FP32_BYTES * _WEIGHTS

    def apply(self, block: "Block") -> None:
        for name, scheme in block.schemes.items():
            assert isinstance(scheme, IntegerScheme), "checked by the recipe"
            block.put(name, self.quantize(block.linears[name].weight.detach(), scheme, layer=name))

    def quantize(self, weight: "Tensor", scheme: IntegerScheme, *, layer: str) -> "QuantizedWeight":
        """`weight` [out_features, in_features], any float dtype, in `scheme`. Raises QuantizationFailed naming `layer`."""
        import torch

        from quantizers.grid import as_groups, joined_rows

        grouped = as_groups(weight, scheme, layer)
        importance = (column_importance(weight) if self.balance else torch.ones_like(weight[0])).view(grouped.shape[1:])
        rows = max(1, _WEIGHTS // weight.shape[1])
        grid = joined_rows([self._solve(part, importance, scheme, layer) for part in torch.split(grouped, rows)])
        return grid.weight(grid.codes(grouped).view(weight.shape))

    def _solve(self, grouped: "Tensor", importance: "Tensor", scheme: IntegerScheme, layer: str) -> "Grid":
        from quantizers.grid import minimum_grid

        flat = grouped.reshape(-1, grouped.shape[-1])
        counts = importance.expand(grouped.shape).reshape(flat.shape)
        best = _Best(flat, counts, scheme.qmax)
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
        for start in RANGES[scheme.weight_bits] if self.clip else RANGES[8]:
            scale = ((high - low) * (start / scheme.qmax)).clamp(min=_SMALLEST)
            self._alternate(best, scale, low * start)
        shape = grouped.shape[:-1]
        return minimum_grid(best.scale.view(shape), best.minimum.view(shape), scheme, layer)

    def _alternate(self, best: "_Best", scale: "Tensor", minimum: "Tensor") -> None:
        """From one start, fp32 [N, 1] each; a group stops when its error does not fall any more."""
        import torch

        active, beta = torch.arange(len(scale), device=scale.device), self.beta
        least = torch.full_like(scale, float("inf"))
        for _ in range(self.iterations + 1):
            values, counts = best.values[active], best.counts[active]
            codes, error = best.offer(active, scale, minimum)
            falls = (error < least).squeeze(-1)
            if not bool(falls.any()):
                return
            active, least, scale, minimum = active[falls], error[falls], scale[falls], minimum[falls]
            values, counts, codes = values[falls], counts[falls], codes[falls]
            wanted = values - self._outliers(values - (codes * scale + minimum), scale, beta)
            minimum = (counts * (wanted - scale * codes)).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)
            beta *= self.kappa

    def _outliers(self, error: "Tensor", scale: "Tensor", beta: float) -> "Tensor":
        """The shrinkage sign(e) max(|e| - |e|^(p-1) / beta, 0), with errors in units of the group's step."""
        import torch

        steps = error / scale
        size = steps.abs().clamp(min=1e-6)  # an error of zero has a shrinkage of zero, not of 0 * infinity
        return steps.sign() * torch.relu(size - size.pow(self.lp_norm - 1) / beta) * scale


@dataclass
class _Best:
    """What each of N groups was best served by so far. `values` and `counts` fp32 [N, group]; scale, minimum, error fp32 [N, 1]."""

    values: "Tensor"
    counts: "Tensor"
    qmax: int

    def __post_init__(self) -> None:
        import torch

        self.scale, self.minimum = (torch.zeros_like(self.values[:, :1]) for _ in range(2))
        self.error = torch.full_like(self.scale, float("inf"))

    def offer(self, active: "Tensor", scale: "Tensor", minimum: "Tensor") -> "tuple[Tensor, Tensor]":
        """Codes [n, group] and weighted squared errors [n, 1] of the `active` groups on a grid, which is kept where it is the best."""
        values = self.values[active]
        codes = ((values - minimum) / scale).clamp_(0, self.qmax).round_()
        error = ((codes * scale + minimum - values).square_() * self.counts[active]).sum(-1, keepdim=True)
        better = (error < self.error[active]).squeeze(-1)
        kept = active[better]
        self.scale[kept], self.minimum[kept], self.error[kept] = scale[better], minimum[better], error[better]
        return codes, error


def column_importance(weight: "Tensor") -> "Tensor":
    """fp32 [in]: 1 / mean square of each column of `weight` [out, in], with a mean of about 1."""
    squares = weight.float().square().mean(0)
    mean = squares.mean().clamp(min=1e-30)  # of a matrix of zeros
    return mean / squares.clamp(min=float(mean) * _LEAST_SHARE)
