"""From logits to the next tokens of a batch: penalties, filters, seeded choice, log-probabilities.

Filters work along the last dimension and take any leading ones. The order follows transformers' generation: repetition
penalty, presence and frequency penalties, logit bias, the ban of end tokens, temperature, top-k, top-p, min-p. The random number
of a token depends on (seed, its index in the output) alone, so that a seed gives the same text whatever else runs beside it.

On the host the native kernels choose, or torch where there are none. On a device nothing is waited for before a batch's tokens are known
(`decide`); they come to the host in one copy.
"""

import math
import secrets
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from quantizers.errors import InvalidInput, PrecisError
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.sampling import Filters, log_probabilities
from quantizers.kernels.cpu.sampling import choose as native_choose
from server.engine.device import move, one_thread
from server.engine.grammar import Constraint
from server.engine.interface import Sampling, TokenLogprob

_MINUS_INFINITY = float("-inf")
_NUCLEUS_GUESS = 1024  # top-p nearly always needs fewer tokens; a partial sort of these is 10 times faster than of a 49k vocabulary
_GREEDY_BELOW = 1e-5  # a logit gap of 0.001 is already e^100 here, and a division in fp32 nears overflow
_UINT64 = (1 << 64) - 1
Sampled = tuple[int, TokenLogprob | None]


class NonFiniteLogits(PrecisError):
    """The model's output held NaN or infinity: nothing can be sampled from it, and log-probabilities would be lies."""

    code = "nonfinite_logits"


@one_thread()
def is_finite(logits: Tensor) -> bool:
    """Whether all of `logits` [..., vocab], one or more, is finite."""
    low, high = logits.aminmax()  # either is NaN where any is
    return bool((low.isfinite() & high.isfinite()).all())


def check_finite(logits: Tensor) -> None:
    """Raises NonFiniteLogits unless all of `logits` [..., vocab] is finite."""
    if not is_finite(logits):
        raise nonfinite(logits)


def nonfinite(logits: Tensor) -> NonFiniteLogits:
    """What to say of `logits` that are not all finite."""
    bad = int((~torch.isfinite(logits)).sum())
    return NonFiniteLogits(
        f"the model's output has {bad} of {logits.numel()} logits that are NaN or infinite; only finite ones can be sampled from. "
        "Try a precision with a wider range, such as bf16 or fp32"
    )


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Positive logits [vocab] of the tokens `seen` (int64, each once) divided by `penalty`, negative ones times it (CTRL, 4.1)."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def apply_count_penalties(logits: Tensor, tokens: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract `frequency` per occurrence and `presence` once from logits [vocab] of `tokens` (int64, each once).

    `counts` (fp32, as many) counts generated tokens only, as OpenAI defines it.
    """
    return logits.index_copy(0, tokens, logits[tokens] - frequency * counts - presence)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """All but the `k` largest become -inf; values equal to the k-th stay.

    `k`: one number, or int64 [rows] on the host for logits [rows, vocab].
    """
    vocab = logits.shape[-1]
    if isinstance(k, int):
        kth = logits.topk(min(k, vocab)).values[..., -1:]
    else:
        k = k.clamp(max=vocab)
        kth = logits.topk(int(k.max())).values.gather(-1, move(k, logits.device)[:, None] - 1)
    return logits.masked_fill(logits < kth, _MINUS_INFINITY)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches `p`, at least one (nucleus sampling, Holtzman et al. 2020, 3.1).

    `p`: one number, or fp32 [rows] for logits [rows, vocab].
    """
    share = p[:, None] if isinstance(p, Tensor) else p
    probabilities = logits.softmax(-1)
    # Elsewhere than on a CPU the guess would have to be waited for, and a full sort is cheap.
    guess = min(_NUCLEUS_GUESS, logits.shape[-1]) if logits.device.type == "cpu" else logits.shape[-1]
    mass, ids = probabilities.topk(guess)
    cumulative = mass.cumsum(-1)
    if guess < logits.shape[-1] and bool((cumulative[..., -1:] < share).any()):
        mass, ids = probabilities.sort(descending=True)
        cumulative = mass.cumsum(-1)
    before = cumulative - mass
    before[..., 0] = 0.0
    kept = logits.gather(-1, ids).masked_fill(before >= share, _MINUS_INFINITY)
    return torch.full_like(logits, _MINUS_INFINITY).scatter(-1, ids, kept)


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one. `min_p`: one number, or fp32 [rows] for logits [rows, vocab]."""
    share = min_p[:, None] if isinstance(min_p, Tensor) else min_p
    probabilities = logits.softmax(-1)
    floor = share * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < floor, _MINUS_INFINITY)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on the 64 bits of `seed` and on `index` only: counter-based (Philox), so without a state to share."""
    # Arrays, because numpy would make floats of a list with numbers from 2^63 on, and seeds that are near each other the same.
    key, counter = np.array([seed & _UINT64, 0], np.uint64), np.array([index, 0, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    return float(np.random.Generator(bits).random())


def choose(logits: Tensor, u: Sequence[float]) -> Tensor:
    """int64 [rows]: of each row of `logits` [rows, vocab], the token at which its distribution, summed in fp64 by token id, passes `u`."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    targets = total * move(torch.tensor(u, dtype=torch.float64), logits.device)[:, None]
    found = torch.searchsorted(cumulative, targets, right=True)
    # The target may round up to the total, past every token: then the last one that has any mass.
    return torch.minimum(found, torch.searchsorted(cumulative, total))[:, 0]


def token_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Natural-log probabilities of `token_ids` [rows] under `logits` [rows, vocab] fp32, with the `top` likeliest of each row."""
    if logits.device.type == "cpu" and library.missing() is None:
        chosen, best, values = log_probabilities(logits.contiguous(), token_ids, top)
        found = chosen, best.tolist(), values.tolist()
    else:
        found = _torch_logprobs(logits, token_ids, top)
    return [
        TokenLogprob(token_id=token, logprob=logprob, top=tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, top_ids, top_values in zip(token_ids, *found, strict=True)
    ]


@one_thread()
def _torch_logprobs(logits: Tensor, token_ids: Sequence[int], top: int) -> tuple[list[float], list[list[int]], list[list[float]]]:
    logprobs = logits.log_softmax(-1)
    rows = torch.arange(logits.shape[0], device=logits.device)
    values, ids = logprobs.topk(min(top, logits.shape[-1]))
    return logprobs[rows, torch.tensor(token_ids, device=logits.device)].tolist(), ids.tolist(), values.tolist()


class Sampler:
    """The sampling state of one sequence: what it has seen, counted and drawn.

    `end_ids` are the tokens that would end the sequence; they are banned until `min_tokens` are out. Token ids of `prompt` and
    `end_ids` must be inside the vocabulary. What `constraint` forbids is never chosen.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        end_ids: Collection[int],
        device: torch.device,
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._index = 0
        self._device = device
        self._seen: dict[int, None] | None = None if sampling.repetition_penalty == 1.0 else dict.fromkeys(prompt)
        self._seen_ids = self._on_device(list(self._seen or ()))
        self._counts: dict[int, int] | None = {} if sampling.presence_penalty or sampling.frequency_penalty else None
        self._biased = self._bias = self._banned = None
        if sampling.logit_bias:
            self._biased = self._on_device(list(sampling.logit_bias))
            self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=device)
        if sampling.min_tokens and end_ids:
            self._banned = self._on_device(sorted(end_ids))

    def next(self, logits: Tensor) -> Sampled:
        """The next token id after `logits` [vocab], any floating dtype, and its log-probability where asked for.

        Raises NonFiniteLogits, and InvalidInput where the options leave no token to choose.
        """
        (sampled,) = sample([logits], [self])
        if isinstance(sampled, PrecisError):
            raise sampled
        return sampled

    @property
    def options(self) -> Sampling:
        return self._sampling

    @property
    def greedy(self) -> bool:
        return self._sampling.temperature < _GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything now."""
        return self._bans or bool(self._seen or self._counts) or self._bias is not None or self._constraint is not None

    @property
    def plain(self) -> bool:
        """Whether all tokens from now on depend on their logits and `draw` alone, and nothing else is wanted of them."""
        wants = self._sampling.logprobs is not None or self._seen is not None or self._counts is not None or self._bias is not None
        return not (wants or self._bans or self._constraint is not None)

    @property
    def filters(self) -> Filters:
        """From which tokens one is drawn."""
        options = self._sampling
        return Filters(0.0 if self.greedy else options.temperature, options.top_k, options.top_p, options.min_p)

    @property
    def complete(self) -> bool:
        """Nothing can follow but the end, and that need not be waited for."""
        return self._constraint is not None and self._constraint.complete

    def prepare(self) -> None:
        """What the next token needs and is known before its logits are begins to be computed, in another thread."""
        if self._constraint is not None:
            self._constraint.prepare()

    @property
    def _bans(self) -> bool:
        return self._banned is not None and self._index < self._sampling.min_tokens

    def adjust(self, logits: Tensor) -> Tensor:
        """`logits` [vocab] fp32 with penalties, bias and bans."""
        options = self._sampling
        if self._seen:
            logits = apply_repetition_penalty(logits, self._seen_ids, options.repetition_penalty)
        if self._counts:
            tokens, counts = self._on_device(list(self._counts)), self._on_device(list(self._counts.values()), torch.float32)
            logits = apply_count_penalties(logits, tokens, counts, options.presence_penalty, options.frequency_penalty)
        if self._biased is not None and self._bias is not None:
            logits = logits.index_add(0, self._biased, self._bias)
        if self._banned is not None and self._bans:
            logits = logits.index_fill(-1, self._banned, _MINUS_INFINITY)
        if self._constraint is not None:
            logits = logits.masked_fill(self._constraint.forbidden(), _MINUS_INFINITY)
        return logits

    def draw(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the next token, or of the one `ahead` behind it."""
        return uniform(self._seed, self._index + ahead)

    def accept(self, token: int) -> None:
        """`token` is the next one."""
        if self._seen is not None and token not in self._seen:
            self._seen[token] = None
            self._seen_ids = torch.cat([self._seen_ids, self._on_device([token])])
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.accept(token)
        self._index += 1

    def _on_device(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return move(torch.tensor(values, dtype=dtype), self._device)

    def nothing_left(self) -> PrecisError:
        options = self._sampling
        if self._constraint is not None and self._constraint.failure is not None:
            return self._constraint.failure
        return InvalidInput(
            f"no token is left: min_tokens={options.min_tokens} with {len(options.stop_token_ids)} stop_token_ids bans all, or "
            f" repetition_penalty={options.repetition_penalty} or logit_bias carries the logits out of range"
        )


def sample(rows: Sequence[Tensor], samplers: Sequence[Sampler], largest: Sequence[int | None] | None = None) -> list[Sampled | PrecisError]:
    """The next token of every sequence after its row [vocab] of logits, any floating dtype, and its log-probability on demand.

    An error of a row is that row's result: NonFiniteLogits, or InvalidInput where its options leave no token to choose. A row's
    token does not depend on the other rows. `largest`: of each row, where it is known, its first largest logit, -1 where one is not finite.
    """
    rows = [row.float() for row in rows]
    if rows and rows[0].device.type == "cpu":
        decided = _decide_on_host(rows, samplers, largest or [None] * len(rows))
    else:
        found = decide(torch.stack(list(rows)), samplers).T.tolist() if rows else []
        decided = [(token, bool(empty), bool(spoiled)) for token, empty, spoiled in found]
    results: list[Sampled | PrecisError] = []
    for row, sampler, (token, empty, spoiled) in zip(rows, samplers, decided, strict=True):
        if spoiled or empty:
            results.append(nonfinite(row) if spoiled else sampler.nothing_left())
            continue
        sampler.accept(token)
        wanted = sampler.options.logprobs
        results.append((token, None if wanted is None else token_logprobs(row[None], [token], wanted)[0]))
    return results


def _decide_on_host(rows: Sequence[Tensor], samplers: Sequence[Sampler], largest: Sequence[int | None]) -> list[tuple[int, bool, bool]]:
    """What `decide` says of each row, much faster, and without waking threads that would go on spinning beside the next step."""
    found: list[tuple[int, bool, bool]] = []
    drawn: list[tuple[int, Tensor]] = []
    for index, (row, sampler, known) in enumerate(zip(rows, samplers, largest, strict=True)):
        token, spoiled = _largest(row) if known is None else (known, known < 0)
        empty = False
        if not spoiled and sampler.adjusts:
            row = _adjusted(row, sampler)
            token = int(row.numpy().argmax())
            empty = not math.isfinite(row[token])
        if not (spoiled or empty or sampler.greedy):
            drawn.append((index, row))
        found.append((token, empty, spoiled))
    for (index, _), token in zip(drawn, _draw_on_host([row for _, row in drawn], [samplers[index] for index, _ in drawn]), strict=True):
        found[index] = token, token < 0, False
    return found


@one_thread()
def _adjusted(row: Tensor, sampler: Sampler) -> Tensor:
    return sampler.adjust(row)


def _draw_on_host(rows: Sequence[Tensor], samplers: Sequence[Sampler], ahead: int = 0) -> list[int]:
    """As `_draw` of rows that are not yet shifted; -1 of one that leaves no token."""
    if not rows:
        return []
    if library.missing() is None:
        return native_choose(rows, [sampler.filters for sampler in samplers], [sampler.draw(ahead) for sampler in samplers])
    with one_thread():
        logits = torch.stack(list(rows))
        tokens: list[int] = _draw(logits - logits.amax(-1, keepdim=True), samplers, ahead).tolist()
    return tokens


def _largest(row: Tensor) -> tuple[int, bool]:
    """Of fp32 [vocab] on the host: its first largest, and whether any is NaN or infinite."""
    values = row.numpy()
    token = int(values.argmax())  # the first NaN where there is one
    return token, not (np.isfinite(values[token]) and np.isfinite(values.min()))


def decide(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """int64 [3, rows] on the device: the next token after each row of `logits` [rows, vocab] fp32, which means nothing where the second
    is 1, as the options leave no token, or the third, as the row is not finite.
    """
    adjusted = logits
    if any(sampler.adjusts for sampler in samplers):
        adjusted = torch.stack([sampler.adjust(row) if sampler.adjusts else row for sampler, row in zip(samplers, logits, strict=True)])
    low, high = logits.aminmax(dim=-1)  # either is NaN where any of a row is
    peaks, tokens = adjusted.max(-1)
    if drawn := [row for row, sampler in enumerate(samplers) if not sampler.greedy]:
        rows = move(torch.tensor(drawn), logits.device)
        # Shifted first: a small temperature then sends the rest to -inf and leaves the best at 0, instead of overflowing both.
        shifted = adjusted[rows] - peaks[rows, None]
        tokens = tokens.index_copy(0, rows, _draw(shifted, [samplers[row] for row in drawn]))
    return torch.stack([tokens, (~peaks.isfinite()).long(), (~(low.isfinite() & high.isfinite())).long()])


def guess(logits: Tensor, samplers: Sequence[Sampler], ahead: int) -> list[int]:
    """What each would choose after its row of `logits` [rows, vocab] as the token `ahead` behind its next one.

    Penalties, bias and grammar are left out, and nothing is accepted: these are drafts.
    """
    logits = logits.float()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if logits.device.type == "cpu":
        guessed = [_largest(row)[0] for row in logits]
        chosen = _draw_on_host([logits[row] for row in drawn], [samplers[row] for row in drawn], ahead)
        for row, token in zip(drawn, chosen, strict=True):
            guessed[row] = min(max(0, token), logits.shape[-1] - 1)
        return guessed
    peaks, tokens = logits.max(-1)
    if drawn:
        rows = move(torch.tensor(drawn), logits.device)
        shifted = logits[rows] - peaks[rows, None]
        tokens = tokens.index_copy(0, rows, _draw(shifted, [samplers[row] for row in drawn], ahead))
    found: list[int] = tokens.clamp(0, logits.shape[-1] - 1).tolist()  # of logits that are not numbers, any token will do
    return found


def _draw(shifted: Tensor, samplers: Sequence[Sampler], ahead: int = 0) -> Tensor:
    """Tokens of rows whose best logit is 0, by temperature, top-k, top-p, min-p and each sampler's random number."""
    device = shifted.device

    def column(values: Sequence[float]) -> Tensor:
        return move(torch.tensor(values, dtype=torch.float32), device)

    options = [sampler.options for sampler in samplers]
    logits = shifted / column([option.temperature for option in options])[:, None]
    if some := [row for row, option in enumerate(options) if option.top_k]:
        rows = move(torch.tensor(some), device)
        logits[rows] = keep_top_k(logits[rows], torch.tensor([options[row].top_k for row in some]))
    if some := [row for row, option in enumerate(options) if option.top_p < 1]:
        rows = move(torch.tensor(some), device)
        logits[rows] = keep_top_p(logits[rows], column([options[row].top_p for row in some]))
    if some := [row for row, option in enumerate(options) if option.min_p]:
        rows = move(torch.tensor(some), device)
        logits[rows] = keep_min_p(logits[rows], column([options[row].min_p for row in some]))
    return choose(logits, [sampler.draw(ahead) for sampler in samplers])
