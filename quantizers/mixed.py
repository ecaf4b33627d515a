"""Mixed precision: a budget of bits a weight, spent where the measured error falls most.

Each group of layers that share an input (so that what is executed together has one format) is rounded to nearest in every width, alone, and
what that does to its block's output is measured: the mean over tokens of ||y' - y||^2 / ||y||^2, y a row of the residual stream, whose
normalizations make errors count by their relative size. The errors of groups are taken to add up. Widths are then bought along the lower
convex hull of each group's (bits, error), the steepest step first (Shoham and Gersho 1988, Efficient bit allocation, section III), which is
the best assignment for the bits that it uses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from quantizers.block import Block
from quantizers.flow import Streams
from quantizers.grid import rounded
from quantizers.scheme import IntegerScheme, MixedScheme

SAMPLES = 4  # of the calibration: 2048 tokens tell the widths of a group apart, and every group is tried in four of them


@dataclass(frozen=True)
class Offer:
    """One width for a group: all the bits that it stores, and the error that it causes."""

    scheme: IntegerScheme
    bits: float
    error: float


def offers(block: Block, index: int, streams: Streams, schemes: Mapping[str, object]) -> dict[tuple[str, ...], list[Offer]]:
    """An offer a width for each group of layers of `block`, number `index`, that are a MixedScheme in `schemes`. No weight is changed."""
    assert streams.full is not None, "asked for by whoever made the streams"
    output = streams.run(block.module, index, streams.full)
    size = output.square().sum(-1, keepdim=True)
    found: dict[tuple[str, ...], list[Offer]] = {}
    for group in block.groups:
        mixed = {name: scheme for name in group.names if isinstance(scheme := schemes.get(name), MixedScheme)}
        if not mixed:
            continue
        kept = {name: block.linears[name].weight.detach().clone() for name in mixed}
        listed = found[tuple(mixed)] = []
        for choice in next(iter(mixed.values())).choices:
            for name, weight in kept.items():
                block.linears[name].weight.copy_(rounded(weight, choice, name))
            changed = (streams.run(block.module, index, streams.full) - output).square().sum(-1, keepdim=True)
            bits = sum(weight.numel() * choice.bits_per_weight(weight.shape[1]) for weight in kept.values())
            listed.append(Offer(choice, bits, float(streams.tokens(changed / size).mean())))
        for name, weight in kept.items():
            block.linears[name].weight.copy_(weight)
    streams.full = output
    return found


def spend(budget: float, groups: Mapping[tuple[str, ...], list[Offer]]) -> dict[str, IntegerScheme]:
    """The format of each layer: all offers taken store at most `budget` bits, which must be enough for every group's cheapest."""
    hulls = {names: _hull(listed) for names, listed in groups.items()}
    taken = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bits for hull in hulls.values())
    steps = [
        ((before.error - after.error) / (after.bits - before.bits), names, step)
        for names, hull in hulls.items()
        for step, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    for _, names, step in sorted(steps, key=lambda each: -each[0]):  # stable, and steps of one group come in order
        price = hulls[names][step].bits - hulls[names][step - 1].bits
        if taken[names] == step - 1 and price <= left:
            taken[names], left = step, left - price
    return {name: hulls[names][step].scheme for names, step in taken.items() for name in names}


def _hull(listed: list[Offer]) -> list[Offer]:
    """The offers on the lower convex hull from the cheapest to the one with the least error, in the order of their bits."""
    hull: list[Offer] = []
    for offer in sorted(listed, key=lambda each: each.bits):
        if hull and offer.error >= hull[-1].error:
            continue  # dearer and no better
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-1], offer):
            hull.pop()
        hull.append(offer)
    return hull


def _gain(before: Offer, after: Offer) -> float:
    return (before.error - after.error) / (after.bits - before.bits)
