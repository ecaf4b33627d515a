"""Calibration text that the model writes itself, for who has no data (Liu et al. 2023, LLM-QAT, arXiv 2305.17888, section 2.1).

Each sample begins with a token drawn from the vocabulary. The next few tokens are the likeliest ones, which leads into ordinary text,
and the rest is drawn from the model's own distribution, which keeps the samples apart.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantizers.calibration import Calibration
from quantizers.errors import InvalidInput, QuantizationFailed

SOURCE = "self"
_GREEDY_UNTIL = (3, 4, 5)  # the paper's three lengths of the greedy beginning, the first token counted
BATCH_TOKENS = 8192  # that are written at once: bounds the cache of keys and values


def generate_calibration(
    model: PreTrainedModel, allowed: Tensor, *, samples: int, length: int, seed: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Calibration:
    """`samples` texts of `length` tokens by `model`, which is whole and in evaluation mode; the same for the same seed.

    allowed: bool [vocabulary], the tokens that may occur; special ones should not, or texts would end early. `progress` is told
    tokens done and tokens to do. Raises InvalidInput where no token is allowed, QuantizationFailed where the model computes no numbers.
    """
    if not bool(allowed.any()):
        raise InvalidInput(
            "the checkpoint's tokenizer has no ordinary tokens to begin a text with: calibrate on a file", param="calibration"
        )
    generator = torch.Generator(device=allowed.device).manual_seed(seed)
    choice = allowed.nonzero().view(-1)
    order = torch.randperm(len(choice), generator=generator, device=allowed.device)
    first = choice[order[torch.arange(samples, device=allowed.device) % len(choice)]]
    until = torch.tensor(_GREEDY_UNTIL, device=allowed.device)[torch.arange(samples, device=allowed.device) % len(_GREEDY_UNTIL)]
    batch = max(1, BATCH_TOKENS // length)
    batches = []
    for start in range(0, samples, batch):
        rows = slice(start, start + batch)
        report = partial(_report, progress, start * length, samples * length)
        batches.append(_write(model, first[rows], until[rows], allowed, length, generator, report))
    tokens = torch.cat(batches).cpu()
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(tokens, torch.ones_like(tokens), SOURCE, digest, seed)


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    first: Tensor,
    until: Tensor,
    allowed: Tensor,
    length: int,
    generator: torch.Generator,
    progress: Callable[[int], None],
) -> Tensor:
    """int64 [batch, length], beginning with `first` [batch]; likeliest tokens up to the positions `until` [batch]."""
    tokens = first.new_empty(len(first), length)
    tokens[:, 0] = first
    cache = {_cache_name(model): DynamicCache(config=model.config)}
    for position in range(1, length):
        logits = model(input_ids=tokens[:, position - 1 : position], use_cache=True, **cache).logits[:, -1].float()
        if not bool(torch.isfinite(logits).all()):
            raise QuantizationFailed(
                "the model's own logits are not finite, so it can write no calibration text: the checkpoint is damaged"
            )
        logits = logits.masked_fill(~allowed, -torch.inf)
        drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).view(-1)
        tokens[:, position] = torch.where(position < until, logits.argmax(-1), drawn)
        progress(len(first) * (position + 1))
    return tokens


def _cache_name(model: PreTrainedModel) -> str:
    """The parameter of the forward pass that takes the cache: transformers renamed it within version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
