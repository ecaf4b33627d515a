"""Training a whole quantized model end to end against the checkpoint: the loss is KL(checkpoint || model) over the vocabulary, mean over
tokens (Liu et al. 2023, LLM-QAT, arXiv 2305.17888, section 2.2, with both distributions at temperature 1).

The checkpoint is not run again: what its last block gave for the calibration tokens goes through what follows the blocks. The whole model
is in memory meanwhile, everything but the learning weights in fp32.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from quantizers.block import BlockLoss, Training
from quantizers.flow import Chunk
from quantizers.training.blockwise import drawn, measured, split
from quantizers.training.learned import Computes, Rounded, computing_with, running
from quantizers.training.trainer import ParameterGroup, Plan, train
from quantizers.weights import QuantizedWeight

NAME = "model"  # of the whole, where blocks have their names
_NONE = -100  # no label


class Trained(Computes, Protocol):
    """A layer's weight that learns."""

    def leaves(self) -> dict[str, Tensor]:
        """What learns, by name."""
        ...

    def quantized(self) -> QuantizedWeight:
        """Rounded for good."""
        ...


@dataclass(frozen=True)
class Whole:
    """A model whose blocks are quantized, before any of it is written.

    model: every parameter that is not a quantized weight is there. weights: by full name; floating: fp32 [out, in], what they were made
    from, where the method keeps it. hidden: what the full-precision stream left the
    last block with, fp32 [samples, length, hidden_size], of the tokens int64 [samples, length] with their mask.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    weights: Mapping[str, QuantizedWeight]
    floating: Mapping[str, Tensor]
    tokens: Tensor
    mask: Tensor
    hidden: Tensor
    chunks: Sequence[Chunk]
    in_tuple: bool
    training: Training

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The quantized ones, by full name."""
        return {name: self.model.get_submodule(name) for name in self.weights}

    def logits(self, chunk: Chunk) -> Tensor:
        """Of the model as it is, fp32 [tokens without padding, vocabulary]."""
        rows = chunk.samples
        logits: Tensor = self.model(input_ids=self.tokens[rows], attention_mask=self.mask[rows], use_cache=False).logits
        return chunk.tokens(logits)

    def labels(self, chunk: Chunk) -> Tensor:
        """int64 [tokens without padding]: the token that really follows each, _NONE after the last."""
        tokens, mask = self.tokens[chunk.samples], self.mask[chunk.samples]
        following = torch.full_like(tokens, _NONE)
        following[:, :-1] = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, _NONE)
        return chunk.tokens(following.unsqueeze(-1)).view(-1)

    def teacher(self, chunk: Chunk) -> Tensor:
        """Logarithms of the checkpoint's probabilities, of that shape."""
        with torch.no_grad(), ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(running(block, _passing(self.hidden[chunk.samples], self.in_tuple)))
            return torch.log_softmax(self.logits(chunk), -1)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Meanwhile blocks keep only their inputs for the backward pass and run again in it (Chen et al. 2016, arXiv 1604.06174): a fifth
        more time, and a fraction of the memory.
        """
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(running(block, partial(_recomputed, block.forward)))
            yield


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def _passing(hidden: Tensor, in_tuple: bool) -> Callable[..., Any]:
    return lambda *_, **__: (hidden,) if in_tuple else hidden


def distil(
    whole: Whole, learning: Mapping[str, Trained], groups: Sequence[ParameterGroup], epochs: int, *, labels: float = 0
) -> dict[str, QuantizedWeight]:
    """Train `groups`, which are leaves of `learning` by full name of their layers, on all tokens `epochs` times, and round for good: the
    weights, or those at the start where the trained ones lose more on the samples held back. `labels` times the negative log-likelihood
    of the text's own next tokens is added to the loss.

    Raises QuantizationFailed where training diverges.
    """
    taught, held = split(whole.chunks)
    parts = (measured(taught), held)
    before, held_before = _measure(whole, whole.weights, parts, labels)
    plan = Plan(steps=epochs * len(taught), warmup=0.05)
    directory = whole.training.directory
    with computing_with(whole.layers, learning), whole.recomputing():
        train(
            groups,
            lambda number: divergence(whole, drawn(taught, number), labels),
            plan,
            name=NAME,
            checkpoint=None if directory is None else directory / f"{NAME}.safetensors",
            identity=_identity(whole, groups, labels),
            tell=whole.training.tell,
        )
    trained = {name: each.quantized() for name, each in learning.items()}
    after, held_after = _measure(whole, trained, parts, labels)
    kept = held_after < held_before
    whole.training.record(BlockLoss(NAME, plan.steps, before, after, held_before, held_after, kept))
    return trained if kept else dict(whole.weights)


def divergence(whole: Whole, chunk: Chunk, labels: float = 0) -> Tensor:
    """Mean over the chunk's tokens of KL(checkpoint || model), and `labels` times the mean negative log-likelihood of the next token."""
    expected = whole.teacher(chunk)
    found = torch.log_softmax(whole.logits(chunk), -1)
    loss = kl_div(found, expected, reduction="sum", log_target=True) / len(expected)
    return loss + labels * nll_loss(found, whole.labels(chunk), ignore_index=_NONE) if labels else loss


def _measure(whole: Whole, weights: Mapping[str, QuantizedWeight], parts: Sequence[Sequence[Chunk]], labels: float) -> list[float]:
    """The same over each of `parts`, with weights rounded for good."""
    rounded = {name: Rounded(weight) for name, weight in weights.items()}
    with torch.no_grad(), computing_with(whole.layers, rounded):
        return [sum(float(divergence(whole, chunk, labels)) for chunk in part) / len(part) for part in parts]


def _identity(whole: Whole, groups: Sequence[ParameterGroup], labels: float) -> str:
    """Of what the losses are made from: the tokens, what the checkpoint makes of them, and where training starts."""
    tensors = [whole.tokens, whole.hidden, *(leaf.detach() for group in groups for leaf in group.parameters.values())]
    return json.dumps([labels, *(float(tensor.sum(dtype=torch.float64)) for tensor in tensors)])
