"""One request while it runs: what a step computed for it becomes its events.

A generation knows its sequence, its sampler and what was told already. When it computes is left to `scheduler`, in which batch to
`steps`, and who is told to `loop`.
"""

from collections.abc import Iterator

from torch import Tensor

from quantizers.kernels.cpu.sampling import Choice
from server.engine.grammar import Compiled
from server.engine.interface import Finished, FinishReason, Request, Started, Token, TokenLogprob
from server.engine.runner import Runner
from server.engine.sampler import Sampled, check_finite, token_logprobs
from server.engine.scheduler import Sequence, Work
from server.engine.speculation import Drafting, StepCost


class Generation:
    """The state of a request that its runner has checked."""

    def __init__(self, call: int, request: Request, runner: Runner, arrival: float, grammar: Compiled | None = None) -> None:
        """`arrival` is in seconds of the clock that the scheduler's deadlines are on. `grammar` is this request's own copy."""
        self.id = request.id
        self._request, self._sampling = request, request.sampling
        self._end_ids = runner.end_ids(request)
        self.sampler = runner.sampler(request, grammar)
        self._logprobs: list[TokenLogprob | None] = [None]
        self._started = False
        self._drafting = Drafting()
        self.sequence = Sequence(
            call,
            list(request.prompt_token_ids),
            self._sampling.max_tokens,
            arrival,
            salt=request.cache_salt,
            priority=request.priority,
            scored=None if self._sampling.prompt_logprobs is None else 0,
        )
        if request.deadline_seconds is not None:
            self.sequence.deadline = arrival + request.deadline_seconds

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the prompt are asked for; they come with Started, which waits for them."""
        return self._sampling.prompt_logprobs is not None

    @property
    def needs_nothing(self) -> bool:
        """Whether no step is needed to answer."""
        return self._sampling.max_tokens == 0 and not self.scored

    def begin(self) -> Iterator[Started]:
        """What is told when the first step begins."""
        if not self._started and not self.scored:
            yield self._start(None)

    def score(self, work: Work, logits: Tensor, *, finite: bool) -> None:
        """Take the log-probabilities of the prompt from `logits` [positions, vocab] of `work`, from its logits_from on.

        Raises NonFiniteLogits, unless it is known that all are `finite`.
        """
        prompt = self._request.prompt_token_ids
        following = prompt[work.logits_from + 1 : work.end + 1]
        if following:
            rows = logits[: len(following)]
            if not finite:
                check_finite(rows)
            self._logprobs += token_logprobs(rows, following, self._sampling.prompt_logprobs or 0)

    @property
    def room(self) -> int:
        """Tokens that may be drafted now: where only the newest is left to compute, all but the last, which is computed no more."""
        sequence = self.sequence
        ready = sequence.table is not None and len(sequence.tokens) - sequence.computed == 1
        return sequence.max_tokens - sequence.generated - 1 if ready else 0

    def draft(self, sequences: int, cost: StepCost) -> None:
        """Draft tokens for the next step, of so many sequences, from the text so far, where that pays."""
        self.sequence.draft = self._drafting.draft(self.sequence.tokens, self.room, sequences, cost) if self.room > 0 else []

    def choice(self, tokens: int) -> Choice:
        """How the next `tokens` tokens are chosen, where the sampler is `plain`."""
        draws = () if self.sampler.greedy else tuple(self.sampler.draw(ahead) for ahead in range(tokens))
        return Choice(self.sampler.filters, draws, tuple(self._end_ids))

    def ends_with(self, token: int) -> bool:
        """Whether nothing follows `token`, which was sampled."""
        return token in self._end_ids or self.sampler.complete

    def take(self, sampled: tuple[Sampled, ...]) -> Iterator[Started | Token | Finished]:
        """Events after everything known was computed: `sampled` follow; none where no token was asked for."""
        if not self._started:
            yield self._start(tuple(self._logprobs))
        for index, (token, logprob) in enumerate(sampled):
            if token in self._end_ids:
                yield self.finished("stop")
                return
            self.sequence.tokens.append(token)
            yield Token(token_id=token, logprob=logprob)
            if index == len(sampled) - 1 and self.sampler.complete:
                yield self.finished("stop")
                return
        if self.sequence.generated == self._sampling.max_tokens:
            yield self.finished("length")

    def finished(self, reason: FinishReason) -> Finished:
        """The last event."""
        sequence = self.sequence
        return Finished(
            reason=reason, prompt_tokens=sequence.prompt_tokens, cached_tokens=sequence.cached, completion_tokens=sequence.generated
        )

    def _start(self, prompt_logprobs: tuple[TokenLogprob | None, ...] | None) -> Started:
        self._started = True
        return Started(prompt_tokens=self.sequence.prompt_tokens, prompt_logprobs=prompt_logprobs)
