"""Runs one loaded model: prefill in chunks, then one token a step, as a stream of events.

The model is transformers' own module with a cache of its own making; this file decides only what is fed, which positions get
logits, when to stop, and how much memory a sequence holds. Queues and loading are left to `scheduler` and `residents`.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantizers.errors import InvalidInput
from quantizers.skeleton import BUILDING
from server.engine.interface import Finished, FinishReason, MemoryKind, Request, Started, Token, TokenLogprob
from server.engine.sampler import Sampler, check_finite, token_logprobs

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedConfig

PREFILL_CHUNK = 512  # tokens; large enough for full matrix throughput, and a cancelled prompt stops within one
_LOGIT_ELEMENTS = 1 << 24  # positions x vocabulary that are materialised at once for prompt log-probabilities: 64 MiB in fp32
_KV_BLOCK = 256  # tokens that are reserved ahead, so that the ledger is asked once in as many steps

Hold = Callable[[MemoryKind, int], None]


def kv_bytes_per_token(config: "PreTrainedConfig", dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token adds over all layers, from the config alone."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize)


def workspace_bytes(config: "PreTrainedConfig", dtype: torch.dtype, tokens: int, logit_rows: int) -> int:
    """Estimate of a step's passing tensors: the widest moment of one block (its MLP), and the logits with two copies by the sampler."""
    text: Any = config.get_text_config(decoder=True)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(tokens * (4 * text.hidden_size + 3 * intermediate) * dtype.itemsize + 3 * logit_rows * text.vocab_size * 4)


class Runner:
    """Execution of one variant. Not thread-safe: one sequence runs at a time."""

    def __init__(self, model: torch.nn.Module, config: "PreTrainedConfig", *, eos_ids: Collection[int], max_model_len: int) -> None:
        text: Any = config.get_text_config(decoder=True)
        self.vocab_size = int(text.vocab_size)
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.cached_tokens = 0  # of the sequence that runs now
        self._model = model
        self._config = config
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self._device, self.kv_dtype = weight.device, weight.dtype
        parameters = inspect.signature(model.forward).parameters
        # transformers renamed the argument in 5.2x; both names are in use among the versions that we support.
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._keeps_logits = "logits_to_keep" in parameters

    def check(self, request: Request) -> None:
        """Raises InvalidInput, naming `param`, where the request cannot run on this model."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise InvalidInput("the prompt is empty: it needs at least one token", param="prompt")
        self._check_ids(prompt, "prompt")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")
        self._check_ids(sampling.logit_bias, "logit_bias")
        for token, bias in sampling.logit_bias.items():
            if not math.isfinite(bias):
                raise InvalidInput(f"the logit_bias of token {token} is {bias}: it must be a finite number", param="logit_bias")
        room = self.max_model_len - len(prompt)
        if room < min(1, sampling.max_tokens):
            raise InvalidInput(
                f"the prompt has {len(prompt)} tokens and the model's context {self.max_model_len}: shorten the prompt to at most "
                f"{self.max_model_len - min(1, sampling.max_tokens)} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        if sampling.max_tokens > room:
            raise InvalidInput(
                f"the prompt's {len(prompt)} tokens and max_tokens={sampling.max_tokens} exceed the model's context of "
                f"{self.max_model_len} tokens: ask for at most {room}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _check_ids(self, token_ids: Collection[int], param: str) -> None:
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidInput(f"token id {token} is outside the vocabulary: ids are 0 to {self.vocab_size - 1}", param=param)

    def run(self, request: Request, *, cancelled: Callable[[], bool], hold: Hold) -> Iterator[Started | Token | Finished]:
        """Events of a request that passed `check`. `cancelled` is asked before every step.

        hold(kind, bytes) is told, before they are allocated, how many bytes the sequence needs from now on; what it raises ends the
        sequence. Raises NonFiniteLogits, and whatever the model's code raises.
        """
        try:
            yield from _Sequence(self, request, cancelled, hold).events()
        finally:
            self.cached_tokens = 0

    def new_cache(self) -> "DynamicCache":
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

    def forward(self, token_ids: Sequence[int], cache: "DynamicCache", rows: int) -> Tensor:
        """Logits [rows, vocab] fp32 of the last `rows` of `token_ids`, which continue what `cache` holds and are added to it."""
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if self._keeps_logits:
            arguments["logits_to_keep"] = rows
        with BUILDING, torch.inference_mode():
            ids = torch.tensor([token_ids], device=self._device)
            logits: Tensor = self._model(input_ids=ids, use_cache=True, **arguments).logits[0, -rows:].float()
        self.cached_tokens = int(cache.get_seq_length())
        return logits

    def chunk_size(self, request: Request) -> int:
        """Prompt tokens of one step; fewer where each needs logits, so that these stay bounded whatever the vocabulary."""
        if request.sampling.prompt_logprobs is None:
            return PREFILL_CHUNK
        return max(1, min(PREFILL_CHUNK, _LOGIT_ELEMENTS // self.vocab_size))

    def kv_bytes(self, tokens: int) -> int:
        return tokens * kv_bytes_per_token(self._config, self.kv_dtype)

    def workspace_bytes(self, tokens: int, logit_rows: int) -> int:
        return workspace_bytes(self._config, self.kv_dtype, tokens, logit_rows)

    def sampler(self, request: Request, end_ids: Collection[int]) -> Sampler:
        return Sampler(request.sampling, request.prompt_token_ids, vocab_size=self.vocab_size, end_ids=end_ids, device=self._device)


class _Sequence:
    """One request while it runs."""

    def __init__(self, runner: Runner, request: Request, cancelled: Callable[[], bool], hold: Hold) -> None:
        self._runner, self._request, self._cancelled, self._hold = runner, request, cancelled, hold
        self._prompt, self._sampling = request.prompt_token_ids, request.sampling
        self._end_ids = frozenset(self._sampling.stop_token_ids) | (frozenset() if self._sampling.ignore_eos else runner.eos_ids)
        self._sampler = runner.sampler(request, self._end_ids)
        self._cache = runner.new_cache()
        self._tokens = 0  # in the cache
        self._kv_held = 0

    def events(self) -> Iterator[Started | Token | Finished]:
        scored = self._sampling.prompt_logprobs is not None
        if not scored:
            yield Started(prompt_tokens=len(self._prompt))
            if self._sampling.max_tokens == 0:
                yield self._finished("length", 0)
                return
        chunk = min(self._runner.chunk_size(self._request), len(self._prompt))
        self._hold("workspace", self._runner.workspace_bytes(chunk, chunk if scored else 1))
        logprobs: list[TokenLogprob | None] = [None]
        logits = None
        for start in range(0, len(self._prompt), chunk):
            if self._cancelled():
                yield self._finished("cancelled", 0)
                return
            tokens = self._prompt[start : start + chunk]
            logits = self._step(tokens, len(tokens) if scored else 1)
            if scored:
                logprobs += self._score(logits, start)
        assert logits is not None, "the prompt was checked not to be empty"
        if scored:
            yield Started(prompt_tokens=len(self._prompt), prompt_logprobs=tuple(logprobs))
        yield from self._decode(logits[-1])

    def _decode(self, logits: Tensor) -> Iterator[Token | Finished]:
        """Tokens after `logits` [vocab] until an end token, the length, or the caller's leave."""
        token = None
        for count in range(self._sampling.max_tokens):
            if self._cancelled():
                yield self._finished("cancelled", count)
                return
            if token is not None:
                logits = self._step([token], 1)[-1]
            token, logprob = self._sampler.next(logits)
            if token in self._end_ids:
                yield self._finished("stop", count)
                return
            yield Token(token_id=token, logprob=logprob)
        yield self._finished("length", self._sampling.max_tokens)

    def _step(self, token_ids: Sequence[int], rows: int) -> Tensor:
        self._tokens += len(token_ids)
        if self._runner.kv_bytes(self._tokens) > self._kv_held:
            self._reserve(self._runner.kv_bytes(-(-self._tokens // _KV_BLOCK) * _KV_BLOCK))
        logits = self._runner.forward(token_ids, self._cache, rows)
        if len(token_ids) > 1:
            # Where an architecture caches more than keys and values of every head, the first chunk shows it.
            self._reserve(max(self._kv_held, cache_bytes(self._cache)))
        return logits

    def _reserve(self, kv_bytes: int) -> None:
        if kv_bytes != self._kv_held:
            self._hold("kv_cache", kv_bytes)
            self._kv_held = kv_bytes

    def _score(self, logits: Tensor, start: int) -> list[TokenLogprob]:
        """Log-probabilities of the prompt tokens that follow the positions of `logits` [rows, vocab], of which `start` is the first."""
        check_finite(logits)
        following = self._prompt[start + 1 : start + 1 + logits.shape[0]]
        return token_logprobs(logits[: len(following)], following, self._sampling.prompt_logprobs or 0) if following else []

    def _finished(self, reason: FinishReason, completion_tokens: int) -> Finished:
        return Finished(reason=reason, prompt_tokens=len(self._prompt), completion_tokens=completion_tokens)


def cache_bytes(cache: "DynamicCache") -> int:
    """Bytes of every tensor that `cache` holds."""
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors)
