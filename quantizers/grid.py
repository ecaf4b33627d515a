"""The grid of an integer format: which scales, zero points and minimums a group gets, and what the nearest codes on it are.

The conventions are compressed-tensors' (`calculate_qparams`): 0 always lies in the range of `none` and `integer`, a symmetric scale is
max|w| / ((2^b - 1) / 2), a zero point is an integer in the range of the codes. `minimum` takes the range as it is. Scales and minimums
are stored in fp16. A search chooses codes for the stored numbers; rounding to nearest chooses them as the others do, before that rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed
from quantizers.finite import all_finite
from quantizers.packing import AT_ONCE, pack_rows
from quantizers.scheme import GROUP_SIZES, IntegerScheme, MinifloatScheme
from quantizers.weights import QuantizedWeight, fits, is_plain_int8

_SMALLEST_FP16 = 2.0**-24
_FP16_ROUNDING = 2.0**-11  # of a normal number, relative
_SEARCH_BYTES = 64 << 20  # of scratch space for one search over a matrix: rows are independent, so they are searched some at a time


@dataclass(frozen=True)
class Grid:
    """fp16 `scale` and, by the scheme, uint8 `zero_point` or fp16 `minimum`, each [out, G] (G groups a row)."""

    scheme: IntegerScheme
    scale: Tensor
    zero_point: Tensor | None = None
    minimum: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """fp32 [out, G]: what the code 0 stands for, so that w = scale * q + base in every kind of format."""
        if self.zero_point is not None:
            return -self.zero_point.float() * self.scale.float()
        return torch.zeros_like(self.scale, dtype=torch.float32) if self.minimum is None else self.minimum.float()

    def codes(self, grouped: Tensor, step: Tensor | None = None) -> Tensor:
        """Nearest codes, as fp32 integers, of `grouped` fp32 [out, G, group]; by `step` fp32 [out, G] instead of the scale."""
        scale = (self.scale.float() if step is None else step).unsqueeze(-1)
        if self.minimum is not None:
            scaled = (grouped - self.minimum.float().unsqueeze(-1)).div_(scale)
        else:
            scaled = grouped / scale
            if self.zero_point is not None:
                scaled += self.zero_point.float().unsqueeze(-1)
        return scaled.clamp_(self.scheme.qmin, self.scheme.qmax).round_()

    def values_(self, codes: Tensor) -> Tensor:
        """fp32 [out, G, group]: what `codes` of that shape and dtype stand for, in their place."""
        if self.zero_point is not None:
            codes -= self.zero_point.float().unsqueeze(-1)
        codes *= self.scale.float().unsqueeze(-1)
        if self.minimum is not None:
            codes += self.minimum.float().unsqueeze(-1)
        return codes

    def split(self, rows: Sequence[int]) -> list["Grid"]:
        """The grids of matrices that were worked on one under the other, with so many `rows` each."""
        scales, none = torch.split(self.scale, list(rows)), [None] * len(rows)
        zero_points = none if self.zero_point is None else torch.split(self.zero_point, list(rows))
        minimums = none if self.minimum is None else torch.split(self.minimum, list(rows))
        return [Grid(self.scheme, *parts) for parts in zip(scales, zero_points, minimums, strict=True)]

    def weight(self, codes: Tensor) -> QuantizedWeight:
        """The stored form of `codes`, integers of any dtype [out, in]."""
        tensors = {"scale": self.scale}
        if self.zero_point is not None:
            tensors["zero_point"] = self.zero_point
        if self.minimum is not None:
            tensors["minimum"] = self.minimum
        if is_plain_int8(self.scheme):
            tensors["codes"] = codes.to(torch.int8)
        else:
            rows = torch.split(codes, max(1, AT_ONCE // codes.shape[1]))
            tensors["codes"] = pack_rows(((part - self.scheme.qmin).to(torch.uint8) for part in rows), self.scheme.weight_bits)
        return QuantizedWeight(self.scheme, codes.shape[0], codes.shape[1], tensors)


def as_groups(weight: Tensor, scheme: IntegerScheme, layer: str) -> Tensor:
    """`weight` [out, in] -> fp32 [out, G, group]. Raises QuantizationFailed naming `layer` where groups do not fit or it is not finite."""
    out_features, in_features = weight.shape
    check_groups_fit(scheme, in_features, layer)
    if not all_finite(weight):
        raise QuantizationFailed("its weights hold NaN or infinity: the checkpoint is damaged", layer=layer)
    return weight.float().view(out_features, -1, scheme.group_size or in_features)


def check_groups_fit(scheme: IntegerScheme | MinifloatScheme, in_features: int, layer: str) -> None:
    """Raises QuantizationFailed naming `layer` where its inputs cannot be cut into the scheme's groups."""
    if isinstance(scheme, MinifloatScheme) and not fits(scheme, in_features):
        raise QuantizationFailed(
            f"its {in_features} inputs are not a multiple of the {scheme.group_size} that share a scale in {scheme.slug}: choose fp8 or an "
            "integer format per channel",
            layer=layer,
        )
    if not fits(scheme, in_features):
        choices = [f"g{size}" for size in GROUP_SIZES if in_features % size == 0]
        raise QuantizationFailed(
            f"its {in_features} inputs are not a multiple of the group size {scheme.group_size}: "
            f"choose {', '.join([*choices, 'no group (per channel)'])}",
            layer=layer,
        )


def range_grid(grouped: Tensor, scheme: IntegerScheme, layer: str) -> Grid:
    """The grid over the whole range of each group of `grouped` fp32 [out, G, group]."""
    return _grid(grouped.amin(-1), grouped.amax(-1), scheme, layer)


def nearest_codes(grouped: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of `grouped` fp32 [out, G, group] on its own `range_grid`; where that is symmetric, by the steps before they were
    stored in fp16.

    The largest weight of a group then lies half a step beyond the last code, between two that are as near. Rounding the step first would
    decide by its last bit, mostly for the smaller one: measured, 2 % more KL at w4g64.
    """
    if not grid.scheme.symmetric:
        return grid.codes(grouped)
    stored, exact = grid.scale.float(), _step(grouped.amin(-1), grouped.amax(-1), grid.scheme)
    return grid.codes(grouped, torch.where((stored - exact).abs() <= _FP16_ROUNDING * exact, exact, stored))  # else it is too small


def rounded(weight: Tensor, scheme: IntegerScheme, layer: str) -> Tensor:
    """What `weight` [out, in] becomes in `scheme`, fp32 of that shape: the nearest numbers on the grid over its range. Raises
    QuantizationFailed naming `layer` where it cannot be.
    """
    grouped = as_groups(weight, scheme, layer)
    grid = range_grid(grouped, scheme, layer)
    return grid.values_(nearest_codes(grouped, grid)).view(weight.shape)


def searched_grid(grouped: Tensor, importance: Tensor, scheme: IntegerScheme, layer: str, shrinks: tuple[float, ...]) -> Grid:
    """The grid over a shrunken range, by group the one of `shrinks` with the least sum of importance * (w - q(w))^2.

    `importance` fp32 [G, group], not negative: how much an error of an input counts, such as the diagonal of the Hessian.
    """
    return searched_by(grouped, lambda difference: difference.square_().mul_(importance).sum(-1), scheme, layer, shrinks)


def searched_by(grouped: Tensor, error: Callable[[Tensor], Tensor], scheme: IntegerScheme, layer: str, shrinks: tuple[float, ...]) -> Grid:
    """The same with any `error` of differences fp32 [rows, G, group], which it may overwrite, -> [rows, G]."""
    rows = max(1, _SEARCH_BYTES // (4 * grouped[0].numel()))
    return joined_rows([_searched(part, error, scheme, layer, shrinks) for part in torch.split(grouped, rows)])


def joined_rows(pieces: Sequence[Grid]) -> Grid:
    """One grid of the grids of some rows each."""
    joined = {
        name: None if getattr(pieces[0], name) is None else torch.cat([getattr(piece, name) for piece in pieces])
        for name in ("scale", "zero_point", "minimum")
    }
    return Grid(pieces[0].scheme, **joined)  # type: ignore[arg-type]


def minimum_grid(scale: Tensor, minimum: Tensor, scheme: IntegerScheme, layer: str) -> Grid:
    """The stored form of real scales and minimums fp32 [out, G]. Raises QuantizationFailed naming `layer` beyond fp16."""
    return Grid(scheme, _to_fp16(scale, layer), minimum=_finite_fp16(minimum, layer))


def grid_of(weight: QuantizedWeight) -> Grid:
    """The grid that `weight`, of an integer format, lies on."""
    assert isinstance(weight.scheme, IntegerScheme), "formats of bitsandbytes have no grid"
    return Grid(weight.scheme, weight.tensors["scale"], weight.tensors.get("zero_point"), weight.tensors.get("minimum"))


def learned_grid(scale: Tensor, zero: Tensor | None, scheme: IntegerScheme, layer: str) -> Grid:
    """The stored form of trained numbers fp32 [out, G]: `zero` is in codes for integer zero points, in weights for minimums."""
    if scheme.zero == "minimum":
        assert zero is not None
        return minimum_grid(scale, zero, scheme, layer)
    point = None if zero is None else zero.round().clamp(0, scheme.qmax).to(torch.uint8)
    return Grid(scheme, _to_fp16(scale, layer), zero_point=point)


def _searched(grouped: Tensor, error: Callable[[Tensor], Tensor], scheme: IntegerScheme, layer: str, shrinks: tuple[float, ...]) -> Grid:
    low, high = grouped.amin(-1), grouped.amax(-1)
    best: Grid | None = None
    least = torch.full_like(low, float("inf"))
    for shrink in shrinks:
        grid = _grid(low * shrink, high * shrink, scheme, layer)
        errors = error(grid.values_(grid.codes(grouped)).sub_(grouped))
        better = errors < least
        least = torch.where(better, errors, least)
        best = grid if best is None else _chosen(better, grid, best)
    assert best is not None, "a search has at least one candidate"
    return best


def _chosen(better: Tensor, new: Grid, old: Grid) -> Grid:
    def pick(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.where(better, first, second)

    return Grid(
        new.scheme,
        torch.where(better, new.scale, old.scale),
        pick(new.zero_point, old.zero_point),
        pick(new.minimum, old.minimum),
    )


def _grid(low: Tensor, high: Tensor, scheme: IntegerScheme, layer: str) -> Grid:
    """`low` and `high` fp32 [out, G]: the range that the codes are to cover."""
    if scheme.zero == "minimum":
        return minimum_grid((high - low) / scheme.qmax, low, scheme, layer)
    exact = _step(low, high, scheme)
    if scheme.symmetric:
        return Grid(scheme, _to_fp16(exact, layer))
    nonzero = exact.clamp(min=torch.finfo(torch.float32).tiny)  # a group of zeros has no range: its zero point is 0
    zero_point = (-low.clamp(max=0) / nonzero).clamp(scheme.qmin, scheme.qmax).round()
    return Grid(scheme, _to_fp16(exact, layer), zero_point=zero_point.to(torch.uint8))


def _step(low: Tensor, high: Tensor, scheme: IntegerScheme) -> Tensor:
    """fp32 [out, G]: of a range that holds 0, without or with an integer zero point."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    return (torch.maximum(-low, high) * 2 if scheme.symmetric else high - low) / (scheme.qmax - scheme.qmin)


def _to_fp16(scale: Tensor, layer: str) -> Tensor:
    """A scale that fp16 would round to zero becomes its smallest positive number, so that nothing is divided by zero."""
    return _finite_fp16(scale, layer).clamp(min=_SMALLEST_FP16)


def _finite_fp16(values: Tensor, layer: str) -> Tensor:
    rounded = values.half()
    if not bool(torch.isfinite(rounded).all()):
        raise QuantizationFailed(
            f"a group's scale or minimum of magnitude {values.abs().max().item():.4g} is beyond fp16 (65504): "
            "use a baseline or a bnb format",
            layer=layer,
        )
    return rounded
