"""Training one decoder block with fake-quantized weights so that it gives what the unquantized block gives.

The loss is the mean over tokens of ||y' - y||^2 / ||y||^2: what follows a block normalizes every token, so a token counts by how far off
it is relative to its own size. A few of the calibration samples are held back; on them it is decided, with weights rounded for good,
whether training was worth it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.block import Block, BlockLoss
from quantizers.flow import Chunk
from quantizers.training.learned import SMALLEST_SCALE, LearnedWeight, Rounded, computing_with
from quantizers.training.trainer import ParameterGroup, Plan, train
from quantizers.weights import QuantizedWeight

_HELD_BACK = 8  # one chunk of so many, and no more than so many chunks
_SMALLEST = 1e-12  # of a token's mean square


@dataclass(frozen=True)
class Rates:
    """Learning rates relative to a tensor's own size: a step of Adam moves weights by `weights` of their root mean square in a layer, and
    scales and zeros by `grid` of the layer's mean scale. 0: it is not trained.
    """

    weights: float
    grid: float = 0.0


def reconstruct(
    block: Block, learned: Mapping[str, LearnedWeight], inputs: Tensor, expected: Tensor, rates: Rates, plan: Plan
) -> dict[str, QuantizedWeight]:
    """Train `learned` on `inputs` -> `expected`, both fp32 [samples, length, hidden_size], and round for good: by layer the trained
    weights, or those at the start where the trained ones give a larger error on the samples held back.

    Raises QuantizationFailed naming the block and step where training diverges.
    """
    taught, held = split(block.streams.chunks)
    start = {name: each.quantized() for name, each in learned.items()}

    def loss_of(number: int) -> Tensor:
        chunk = drawn(taught, number)
        with computing_with(block.layers, learned):
            return relative_error(block.run_chunk(chunk, inputs[chunk.samples]), expected[chunk.samples], chunk)

    directory = block.training.directory
    file = None if directory is None else directory / f"{block.name}.safetensors"
    train(
        _groups(learned, rates),
        loss_of,
        plan,
        name=block.name,
        checkpoint=file,
        identity=_identity(inputs, expected, learned),
        tell=block.training.tell,
    )
    end = {name: each.quantized() for name, each in learned.items()}
    errors = [[block_error(block, weights, inputs, expected, part) for weights in (start, end)] for part in (measured(taught), held)]
    (before, after), (held_before, held_after) = errors
    kept = held_after < held_before
    block.training.record(BlockLoss(block.name, plan.steps, before, after, held_before, held_after, kept))
    return end if kept else start


def split(chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], Sequence[Chunk]]:
    """Those that training sees and, of the last ones, those held back; the only one is both."""
    count = max(1, min(len(chunks) // _HELD_BACK, _HELD_BACK))
    return (chunks, chunks) if len(chunks) == 1 else (chunks[:-count], chunks[-count:])


def measured(taught: Sequence[Chunk]) -> Sequence[Chunk]:
    """Of the chunks that training sees as many as may be held back, since measuring all would take as long as an epoch."""
    return taught[:_HELD_BACK]


def _identity(inputs: Tensor, expected: Tensor, learned: Mapping[str, LearnedWeight]) -> str:
    """Of what the losses are made from, so that a checkpoint of other tokens, other weights or another start is not taken up."""
    sums = [[float(sample.sum(dtype=torch.float64)) for sample in tensor] for tensor in (inputs, expected)]  # a copy in fp64 of one
    starts = {name: [float(leaf.detach().sum(dtype=torch.float64)) for leaf in each.leaves().values()] for name, each in learned.items()}
    return json.dumps([sums, starts])


def drawn(chunks: Sequence[Chunk], number: int) -> Chunk:
    """Chunk number `number` of a training run: all of them in a random order, then all in another."""
    epoch, place = divmod(number, len(chunks))
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(epoch))
    return chunks[int(order[place])]


def _groups(learned: Mapping[str, LearnedWeight], rates: Rates) -> list[ParameterGroup]:
    groups = []
    for name, each in learned.items():
        if rates.weights:
            size = float(each.weight.detach().square().mean().sqrt())
            groups.append(ParameterGroup({f"{name}.weight": each.weight}, rates.weights * size))
        if rates.grid:
            step = float(each.scale.detach().mean())
            groups.append(ParameterGroup({f"{name}.scale": each.scale}, rates.grid * step, low=SMALLEST_SCALE))
            if each.zero is not None:  # in codes, or in weights
                integer = each.scheme.zero == "integer"
                highest = float(each.scheme.qmax) if integer else None
                groups.append(
                    ParameterGroup({f"{name}.zero": each.zero}, rates.grid * (1 if integer else step), 0 if integer else None, highest)
                )
    return groups


def relative_error(output: Tensor, expected: Tensor, chunk: Chunk) -> Tensor:
    """Mean over the chunk's tokens, padding left out, of ||output - expected||^2 / ||expected||^2."""
    difference, size = chunk.tokens((output - expected).square()), chunk.tokens(expected.square())
    return (difference.mean(-1) / size.mean(-1).clamp(min=_SMALLEST)).mean()


def block_error(block: Block, weights: Mapping[str, QuantizedWeight], inputs: Tensor, expected: Tensor, chunks: Sequence[Chunk]) -> float:
    """The same over `chunks`, with weights rounded for good."""
    rounded = {name: Rounded(weight) for name, weight in weights.items()}
    total = 0.0
    with torch.no_grad(), computing_with(block.layers, rounded):
        for chunk in chunks:
            total += float(relative_error(block.run_chunk(chunk, inputs[chunk.samples]), expected[chunk.samples], chunk))
    return total / len(chunks)
