"""AWQ (Lin et al. 2024, arXiv 2306.00978, section 3.2): input channels that carry large activations get finer weights.

Columns are multiplied by s before rounding and what feeds them divided by it, s found on a grid; then each group's range is clipped where
that helps. Both searches measure the error of the layer's outputs over all calibration tokens at once: with the Gram matrix H = X^T X,
||X (W' - W)^T||^2 = sum over rows of d H d^T, d = w' - w.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from quantizers.errors import UnsupportedScheme
from quantizers.methods.base import FP32_BYTES, LayerGroups, Method, Stream
from quantizers.scheme import IntegerScheme, LayerScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.block import Block
    from quantizers.flow import Group
    from quantizers.grid import Grid

_SMALLEST = 1e-4
_CLIPS = tuple(1 - step / 20 for step in range(10))  # of a group's range; the original's: down to about a half


class Awq(Method):
    """AWQ.

    grid: ratios that are tried between no scaling and the whole of the activations' mean magnitude. duo_scaling: try scales that also
    take the weights' magnitude into account. clip: search the range of each group.
    """

    name: Literal["awq"] = "awq"
    summary: ClassVar[str] = "Scale up the weights of strong input channels, then round; calibration text, a minute."
    needs_calibration: ClassVar[bool] = True
    changes_unquantized: ClassVar[bool] = True
    grid: int = Field(default=20, ge=1, le=100)
    duo_scaling: bool = True
    clip: bool = True

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full",))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme) or scheme.activation_bits:
            raise UnsupportedScheme(f"awq makes weight-only integer formats such as w4g64z, not {scheme.slug}", param="model")

    def held_bytes(self, groups: LayerGroups) -> int:
        """A Gram matrix for each group."""
        return FP32_BYTES * sum(group[0][1] ** 2 for group in groups)

    def scratch_bytes(self, groups: LayerGroups) -> int:
        """Beside these, the rows of a group, the same with scales, rounded, and what an error is made of."""
        return self.held_bytes(groups) + 4 * FP32_BYTES * max(
            (sum(rows * columns for rows, columns in group) for group in groups), default=0
        )

    def apply(self, block: "Block") -> None:
        from quantizers.hessian import Gram
        from quantizers.memory import trim_heap
        from quantizers.smoothing import maker, move_scales, shared_by_heads

        grams: dict[Group, Gram] = {}
        sums: dict[Group, Tensor] = {}
        tokens: dict[Group, int] = {}

        def see(group: "Group", x: "Tensor") -> None:
            grams.setdefault(group, Gram()).add(x)
            sums[group] = sums.get(group, 0) + x.abs().sum(0)
            tokens[group] = tokens.get(group, 0) + len(x)

        block.watch(see)
        seen = {group: (gram.mean(), sums[group] / tokens[group]) for group, gram in grams.items()}
        for group, (hessian, magnitude) in seen.items():
            if not block.members(group)[0] or (group.norm is None and maker(block, group) is None):
                continue
            trim_heap()  # of what the group before left between its candidates
            scales = self._scales(block, group, hessian, shared_by_heads(block, group, magnitude))
            move_scales(block, group, scales)
            hessian.div_(scales).div_(scales.unsqueeze(-1))
        for group, (hessian, _) in seen.items():
            for name in block.members(group)[0]:
                trim_heap()
                self._put(block, name, hessian)

    def _scales(self, block: "Block", group: "Group", hessian: "Tensor", magnitude: "Tensor") -> "Tensor":
        """Of all candidates the one whose rounded weights give the outputs with the least error; the identity is one of them."""
        import torch

        from quantizers.grid import rounded
        from quantizers.smoothing import shared_by_heads

        names, scheme = block.members(group)
        assert isinstance(scheme, IntegerScheme), "checked by the recipe"
        weight = torch.cat([block.linears[name].weight.detach() for name in names])
        best, least = torch.ones_like(magnitude), float("inf")
        size = shared_by_heads(block, group, _relative_magnitude(weight, scheme))
        for scales in self._candidates(magnitude, size):
            error = output_error(rounded(weight * scales, scheme, names[0]).div_(scales).sub_(weight), hessian)
            if error < least:
                best, least = scales, error
        return best

    def _candidates(self, magnitude: "Tensor", size: "Tensor") -> "list[Tensor]":
        import torch

        candidates = [torch.ones_like(magnitude)]
        for step in range(1, self.grid + 1):
            ratio = step / self.grid
            candidates.append(_normalized(magnitude.pow(ratio)))
            if self.duo_scaling:
                candidates.append(_normalized(magnitude.pow(ratio) / (size.pow(1 - ratio) + _SMALLEST)))
        return candidates

    def _put(self, block: "Block", name: str, hessian: "Tensor") -> None:
        from quantizers.grid import as_groups, range_grid

        scheme = block.schemes[name]
        assert isinstance(scheme, IntegerScheme)
        weight = block.linears[name].weight.detach()
        grouped = as_groups(weight, scheme, name)
        grid = _clipped(grouped, hessian, scheme, name) if self.clip else range_grid(grouped, scheme, name)
        block.put(name, grid.weight(grid.codes(grouped).view(weight.shape)))


def output_error(difference: "Tensor", hessian: "Tensor") -> float:
    """Squared error of a layer's outputs, summed over rows and averaged over tokens: fp32 [out, in] and [in, in]."""
    return float((difference @ hessian).mul_(difference).sum())


def _relative_magnitude(weight: "Tensor", scheme: IntegerScheme) -> "Tensor":
    """Mean over rows of |w| by the largest of its group: how much of its group's range an input channel takes, fp32 [in]."""
    grouped = weight.abs().view(len(weight), -1, scheme.group_size or weight.shape[1])
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-6)).mean(0).view(-1)


def _normalized(scales: "Tensor") -> "Tensor":
    """With the geometric middle of the largest and the smallest at 1, so that weights stay in their range."""
    positive = scales.clamp(min=_SMALLEST)
    return positive / (positive.max() * positive.min()).sqrt()


def _clipped(grouped: "Tensor", hessian: "Tensor", scheme: IntegerScheme, layer: str) -> "Grid":
    """The range of each group with the least error of what the group contributes to the output."""
    import torch

    from quantizers.grid import searched_by

    groups, size = grouped.shape[1:]
    blocks = torch.stack([hessian[index * size : (index + 1) * size, index * size : (index + 1) * size] for index in range(groups)])

    def error(difference: "Tensor") -> "Tensor":
        by_group = difference.transpose(0, 1)  # [G, out, group]
        return (by_group @ blocks).mul_(by_group).sum(-1).T

    return searched_by(grouped, error, scheme, layer, _CLIPS)
