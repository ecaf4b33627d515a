"""GPTQ (Frantar et al. 2023, arXiv 2210.17323, algorithm 1): columns are rounded one after the other, and what a rounding adds to the
layer's output is taken back by the columns that are still to come.

Inputs are those of the quantized model so far, layer after layer inside a block too. With `target="full"` the layer is to give what the
checkpoint's own layer gives on the checkpoint's own inputs: min ||W X - Q X'||^2 over Q, whose optimum without rounding is
W X X'^T (X' X'^T)^-1, so that errors of the layers before are corrected where they can be. Scales and zero points are found once, before
the first column (static groups), by a search over shrunken ranges.
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
    from quantizers.hessian import Factors
    from quantizers.weights import QuantizedWeight

# Of a group's range: what is clipped of the largest weights buys finer steps for all others.
SHRINKS = tuple(1 - 0.025 * step for step in range(17))


class Gptq(Method):
    """GPTQ.

    damping: what is added to the Hessian's diagonal, of its mean; raised where that is not enough. act_order: columns with the largest
    inputs first. block_size: columns between two updates of all that follow; it changes speed, not the result.
    target: what a layer is to reproduce, the checkpoint's output (`full`) or its own on the inputs that it gets (`quantized`).
    """

    name: Literal["gptq"] = "gptq"
    summary: ClassVar[str] = "Round column by column and correct the columns that follow; calibration text, minutes."
    needs_calibration: ClassVar[bool] = True
    damping: float = Field(default=0.01, gt=0, le=1, allow_inf_nan=False)
    act_order: bool = True
    block_size: int = Field(default=128, ge=1)
    target: Literal["full", "quantized"] = "full"

    def streams(self) -> frozenset[Stream]:
        return frozenset(("full", "quantized")) if self.target == "full" else frozenset(("quantized",))

    def check(self, scheme: LayerScheme) -> None:
        if not isinstance(scheme, IntegerScheme):
            raise UnsupportedScheme(f"gptq makes integer formats such as w4g64, w3g64z, w4g64a8 or w8a8, not {scheme.slug}", param="model")

    def held_bytes(self, groups: LayerGroups) -> int:
        """One group's Hessian, and the product of its two inputs."""
        return len(self.streams()) * FP32_BYTES * _widest(groups) ** 2

    def scratch_bytes(self, groups: LayerGroups) -> int:
        """Beside these, the Hessian reordered and in fp64; or the rows of a group in several stages of their work."""
        factoring = 4 * FP32_BYTES * _widest(groups) ** 2
        working = 6 * FP32_BYTES * max((sum(rows * columns for rows, columns in group) for group in groups), default=0)
        return self.held_bytes(groups) + max(factoring, working)

    def apply(self, block: "Block") -> None:
        from quantizers.hessian import Gram

        hessian, cross = Gram(), Gram()

        def see(group: "Group", x: "Tensor", full: "Tensor | None") -> None:
            if not block.members(group)[0]:
                return
            hessian.add(x)
            if full is not None:
                cross.add(full, x)

        def choose(group: "Group") -> dict[str, "QuantizedWeight"]:
            nonlocal hessian, cross
            if not block.members(group)[0]:
                return {}
            seen, hessian, cross = (hessian.mean(), cross.mean() if self.target == "full" else None), Gram(), Gram()
            return self._group(block, group, *seen)

        block.quantize_in_order(self.streams(), see, choose)

    def _group(self, block: "Block", group: "Group", hessian: "Tensor", cross: "Tensor | None") -> dict[str, "QuantizedWeight"]:
        """The layers of a group share their Hessian, so their rows are worked on together."""
        import torch

        from quantizers.grid import as_groups, searched_grid
        from quantizers.hessian import factors

        names, scheme = block.members(group)
        assert isinstance(scheme, IntegerScheme), "checked by the recipe"
        first = names[0]
        found = factors(hessian, damping=self.damping, by_magnitude=self.act_order, layer=first)
        weights = [block.linears[name].weight.detach() for name in names]
        for name, weight in zip(names, weights, strict=True):
            as_groups(weight, scheme, name)
        weight = torch.cat(weights)
        if cross is not None:
            weight = corrected(weight, cross, found)
        weight = weight.masked_fill(found.dead, 0)
        grouped = as_groups(weight, scheme, first)
        importance = hessian.diagonal().view(grouped.shape[1:])
        grid = searched_grid(grouped, importance, scheme, first, SHRINKS)
        codes = compensated_codes(weight, grid, found, self.block_size)
        sizes = [len(weight) for weight in weights]
        return {name: part.weight(rows) for name, part, rows in zip(names, grid.split(sizes), torch.split(codes, sizes), strict=True)}


def _widest(groups: LayerGroups) -> int:
    return max((columns for group in groups for _, columns in group), default=0)


def corrected(weight: "Tensor", cross: "Tensor", found: "Factors") -> "Tensor":
    """W X X'^T (X' X'^T)^-1, both damped alike so that without evidence W stays: `weight` fp32 [out, in], `cross` = X X'^T [in, in]."""
    import torch

    identity = torch.eye(len(cross), device=cross.device)
    wanted = weight @ (cross + found.ridge * identity)
    order, upper = found.order, found.inverse
    solved = (wanted[:, order] @ upper.T) @ upper  # inverse^T inverse = H^-1
    result = torch.empty_like(solved)
    result[:, order] = solved
    return result


def compensated_codes(weight: "Tensor", grid: "Grid", found: "Factors", block_size: int) -> "Tensor":
    """Codes fp32 [out, in] of `weight` fp32 [out, in] on `grid`: algorithm 1, on the transposed matrix so that a column is contiguous."""
    import torch

    scheme, order, inverse = grid.scheme, found.order, found.inverse
    columns = weight.T[order].contiguous()  # [in, out], in the order of quantization
    codes = torch.empty_like(columns)
    group = (order // (weight.shape[1] // grid.scale.shape[1])).tolist()
    scale, base = grid.scale.float().T.contiguous(), grid.base.T.contiguous()  # [G, out]
    steps = inverse.diagonal().tolist()
    for start in range(0, len(columns), block_size):
        end = min(start + block_size, len(columns))
        errors = torch.empty_like(columns[start:end])
        for index in range(start, end):
            step, offset = scale[group[index]], base[group[index]]
            code = ((columns[index] - offset) / step).clamp_(scheme.qmin, scheme.qmax).round_()
            codes[index] = code
            error = torch.addcmul(offset, code, step).sub_(columns[index]).div_(-steps[index])
            errors[index - start] = error
            columns[index + 1 : end].addr_(inverse[index, index + 1 : end], error, alpha=-1)
        columns[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()
