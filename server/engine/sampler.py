"""From logits to the next token of one sequence: penalties, filters, seeded choice, log-probabilities.

The functions work along the last dimension and take any leading ones. Their order follows transformers' generation: repetition
penalty, presence and frequency penalties, logit bias, the ban of end tokens, temperature, top-k, top-p, min-p. The random number
of a token depends on (seed, its index in the output) alone, so that a seed gives the same text whatever else runs beside it.
"""

import math
import secrets
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from quantizers.errors import InvalidInput, PrecisError
from server.engine.interface import Sampling, TokenLogprob

_MINUS_INFINITY = float("-inf")
_NUCLEUS_GUESS = 1024  # top-p nearly always needs fewer tokens; a partial sort of these is 10 times faster than of a 49k vocabulary
_GREEDY_BELOW = 1e-5  # a logit gap of 0.001 is already e^100 here, and a division in fp32 nears overflow
_UINT64 = (1 << 64) - 1


class NonFiniteLogits(PrecisError):
    """The model's output held NaN or infinity: nothing can be sampled from it, and log-probabilities would be lies."""

    code = "nonfinite_logits"


def check_finite(logits: Tensor) -> None:
    """Raises NonFiniteLogits unless all of `logits` [..., vocab] is finite."""
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise NonFiniteLogits(
            f"the model's output has {bad} of {logits.numel()} logits that are NaN or infinite; only finite ones can be sampled from. "
            "Try a precision with a wider range, such as bf16 or fp32"
        )


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Positive logits [..., vocab] of the tokens in `seen` (bool, same shape) divided by `penalty`, negative ones times it (CTRL, 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract `frequency` per occurrence and `presence` once; `counts` [..., vocab] counts generated tokens only, as OpenAI defines it."""
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but the `k` largest become -inf; values equal to the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth, _MINUS_INFINITY)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `p`, at least one (nucleus sampling, Holtzman et al. 2020, 3.1)."""
    total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(_NUCLEUS_GUESS, logits.shape[-1]))
    mass = (values - total).exp()
    if values.shape[-1] < logits.shape[-1] and bool((mass.sum(-1) < p).any()):
        values, ids = logits.sort(descending=True)
        mass = (values - total).exp()
    before = mass.cumsum(-1) - mass
    before[..., 0] = 0.0
    kept = values.masked_fill(before >= p, _MINUS_INFINITY)
    return torch.full_like(logits, _MINUS_INFINITY).scatter(-1, ids, kept)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one."""
    probabilities = logits.softmax(-1)
    floor = min_p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, _MINUS_INFINITY)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the 64 bits of `seed` and on `index` only: counter-based (Philox), so without a state to share."""
    # Arrays, because numpy would make floats of a list with numbers from 2^63 on, and seeds that are near each other the same.
    key, counter = np.array([seed & _UINT64, 0], np.uint64), np.array([index, 0, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return float(np.random.Generator(bits).random())


def choose(logits: Tensor, u: float) -> int:
    """The token of `logits` [vocab] at which the cumulative distribution, in double precision by token id, passes `u` in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[-1:]
    index = int(torch.searchsorted(cumulative, total * u, right=True))
    # total * u may round up to total, past every token: then the last one that has any mass.
    return min(index, int(torch.searchsorted(cumulative, total)))


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Natural-log probabilities of `token_ids` [rows] under `logits` [rows, vocab] fp32, with the `top` likeliest of each row."""
    total = logits.logsumexp(-1)
    rows = torch.arange(logits.shape[0], device=logits.device)
    chosen = (logits[rows, torch.tensor(token_ids, device=logits.device)] - total).tolist()
    values, ids = logits.topk(min(top, logits.shape[-1]))
    tops = zip(ids.tolist(), (values - total[:, None]).tolist(), strict=True)
    return [
        TokenLogprob(token_id=token, logprob=logprob, top=tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, (top_ids, top_values) in zip(token_ids, chosen, tops, strict=True)
    ]


class Sampler:
    """The sampling state of one sequence: what it has seen, counted and drawn.

    `end_ids` are the tokens that would end the sequence; they are banned until `min_tokens` are out. Token ids of `prompt` and
    `end_ids` must be inside the vocabulary.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], *, vocab_size: int, end_ids: Collection[int], device: torch.device
    ) -> None:
        self._sampling = sampling
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._index = 0
        self._seen = self._counts = self._bias = self._banned = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[list(prompt)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        if sampling.logit_bias:
            self._bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            self._bias[list(sampling.logit_bias)] = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        if sampling.min_tokens and end_ids:
            self._banned = torch.tensor(sorted(end_ids), device=device)

    def next(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token id after `logits` [vocab], any floating dtype, and its log-probability where asked for.

        Raises NonFiniteLogits, and InvalidInput where the options leave no token to choose.
        """
        logits = logits.float()
        check_finite(logits)
        token = self._choose(self._adjust(logits))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        self._index += 1
        wanted = self._sampling.logprobs
        return token, None if wanted is None else token_logprobs(logits[None], [token], wanted)[0]

    def _adjust(self, logits: Tensor) -> Tensor:
        options = self._sampling
        if self._seen is not None:
            logits = apply_repetition_penalty(logits, self._seen, options.repetition_penalty)
        if self._counts is not None:
            logits = apply_count_penalties(logits, self._counts, options.presence_penalty, options.frequency_penalty)
        if self._bias is not None:
            logits = logits + self._bias
        if self._banned is not None and self._index < options.min_tokens:
            logits = logits.index_fill(-1, self._banned, _MINUS_INFINITY)
        return logits

    def _choose(self, logits: Tensor) -> int:
        options = self._sampling
        best = int(logits.argmax())
        if not math.isfinite(float(logits[best])):
            raise InvalidInput(
                f"no token is left: min_tokens={options.min_tokens} with {len(options.stop_token_ids)} stop_token_ids bans all, or "
                f" repetition_penalty={options.repetition_penalty} or logit_bias carries the logits out of range"
            )
        if options.temperature < _GREEDY_BELOW:
            return best
        # Shifted first: a small temperature then sends the rest to -inf and leaves the best at 0, instead of overflowing both.
        logits = (logits - logits[best]) / options.temperature
        if options.top_k:
            logits = keep_top_k(logits, options.top_k)
        if options.top_p < 1:
            logits = keep_top_p(logits, options.top_p)
        if options.min_p:
            logits = keep_min_p(logits, options.min_p)
        return choose(logits, uniform(self._seed, self._index))
