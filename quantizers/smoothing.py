"""Moving a factor for every input channel of some layers from activations into weights, without changing what the block computes.

What makes the activations takes the inverse: the normalization that feeds the group, or the layer whose output channels reach the group's
input one for one (the value projection through attention, the `up` projection through a gated product). That the block still computes
the same is not believed but tried, on a sample of the calibration tokens.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantizers.errors import QuantizationFailed

if TYPE_CHECKING:
    from quantizers.block import Block
    from quantizers.flow import Group

# Layer -> the layer of the same module whose outputs scale its inputs. Attention mixes tokens, not channels, and a gate multiplies them.
_MAKERS = {"o_proj": "v_proj", "down_proj": "up_proj"}
_TOLERANCE = 1e-3  # of what the block adds to its input; fp32 rounding stays below 1e-4 of it
_ROUNDING = 1e-5  # of the block's output, beside large values of which a small change is lost in rounding


def maker(block: "Block", group: "Group") -> str | None:
    """Full name of the layer that can take the inverse factors of a `group` no normalization feeds; None where there is none."""
    if group.norm is not None or len(group.names) != 1:
        return None
    parent, _, layer = group.names[0].rpartition(".")
    name = f"{parent}.{_MAKERS.get(layer, '')}"
    if name not in block.linears or _repeats(block, name, group.names[0]) == 0:
        return None
    return name


def shared_by_heads(block: "Block", group: "Group", values: Tensor) -> Tensor:
    """`values` [in] of a group with a `maker`, averaged over the input channels that one of the maker's channels is repeated to.

    With grouped-query attention several query heads read one value head, so their factors must be the same.
    """
    name = maker(block, group)
    repeats = 1 if name is None else _repeats(block, name, group.names[0])
    if name is None or repeats == 1:
        return values
    heads = values.view(-1, repeats, _head_dim(block, name))
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def move_scales(block: "Block", group: "Group", scales: Tensor) -> None:
    """Multiply the columns of the group's weights by `scales` fp32 [in], positive, and what feeds them by the inverse.

    Raises QuantizationFailed naming the group's first layer where the block does not compute the same afterwards.
    """
    hidden, before = block.run_sample()
    if group.norm is not None:
        _divide_norm(block.submodule(group.norm), scales)
    else:
        name = maker(block, group)
        assert name is not None, "scales are moved where something can take them"
        _divide_rows(block.linears[name], _of_maker(block, name, group.names[0], scales))
    for name in group.names:
        block.linears[name].weight.mul_(scales)
    for name in group.routers:
        block.submodule(name).weight.mul_(scales)  # type: ignore[operator]
    _, after = block.run_sample()
    allowed = _TOLERANCE * float((before - hidden).norm()) + _ROUNDING * float(before.norm())
    changed = float((after - before).norm())
    if not changed <= allowed:
        raise QuantizationFailed(
            f"scaling its input channels changes what the block computes by {changed:.3g} where rounding explains {allowed:.3g}: something "
            "else reads what feeds it, so choose a recipe that moves no scales, such as gptq",
            layer=group.names[0],
        )


def _divide_norm(norm: nn.Module, scales: Tensor) -> None:
    weight = norm._parameters["weight"]
    assert weight is not None
    offset = _weight_offset(norm, weight)
    weight.copy_((weight + offset) / scales - offset)
    bias = norm._parameters.get("bias")
    if bias is not None:
        bias.div_(scales)


def _weight_offset(norm: nn.Module, weight: Tensor) -> float:
    """Some architectures multiply by 1 + weight: a weight of zeros then lets the normalized input through."""
    kept, bias = weight.clone(), norm._parameters.get("bias")
    weight.zero_()
    through = norm(torch.linspace(-1, 1, weight.numel(), device=weight.device)[None])
    weight.copy_(kept)
    return float(bool((through if bias is None else through - bias).any()))


def _divide_rows(layer: nn.Linear, scales: Tensor) -> None:
    layer.weight.div_(scales.unsqueeze(-1))
    if layer.bias is not None:
        layer.bias.div_(scales)


def _of_maker(block: "Block", name: str, layer: str, scales: Tensor) -> Tensor:
    """`scales` [in] of `layer` -> those of its maker's outputs."""
    repeats = _repeats(block, name, layer)
    return scales if repeats == 1 else scales.view(-1, repeats, _head_dim(block, name))[:, 0].reshape(-1)


def _repeats(block: "Block", name: str, layer: str) -> int:
    """To how many of the layer's inputs each of the maker's outputs goes; 0 where that cannot be said."""
    made, taken = block.linears[name].out_features, block.linears[layer].in_features
    if made == taken:
        return 1
    head_dim = _head_dim(block, name)
    return taken // made if head_dim and taken % made == 0 and made % head_dim == 0 else 0


def _head_dim(block: "Block", name: str) -> int:
    value = getattr(block.submodule(name.rpartition(".")[0]), "head_dim", 0)
    return value if isinstance(value, int) else 0
