"""One loaded variant and what it runs with: its executor, its cache, what it can be asked, how much memory that takes.

What is computed when is left to `scheduler`, and who may hold memory to `residents`.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from quantizers.errors import InvalidInput, OutOfMemory
from server.engine.blocks import BlockPool
from server.engine.executor import Executor
from server.engine.grammar import Compiled, Constraint, Grammars
from server.engine.hf_executor import HfExecutor
from server.engine.interface import KvDtype, Request
from server.engine.native_executor import NativeExecutor
from server.engine.sampler import Sampler
from server.engine.scheduler import Limits, Scheduler
from server.engine.speculation import StepCost

_LOGIT_ELEMENTS = 1 << 24  # positions x vocabulary that are materialised at once for prompt log-probabilities: 64 MiB in fp32
_CACHE_TOKENS = 1 << 16  # that a cache is made for where there is room: 32 sequences of 2,048, or the longest one if that is more


def choose_executor(model: PreTrainedModel, config: PretrainedConfig, kv_dtype: KvDtype = "auto") -> Executor:
    """The native step where it can run the model, else transformers' own modeling code. Raises InvalidInput where neither can.

    `kv_dtype`: of the cached keys and values; `auto` is the model's.
    """
    cache_dtype = torch.int8 if kv_dtype == "int8" else None
    if NativeExecutor.why_not(model) is None:
        return NativeExecutor(model, cache_dtype=cache_dtype)
    executor = HfExecutor(model, config, cache_dtype=cache_dtype)
    executor.warm_up()
    return executor


def workspace_bytes(config: PretrainedConfig, dtype: torch.dtype, tokens: int, logit_rows: int) -> int:
    """Estimate of a step's passing tensors: the widest moment of one block (its MLP), and the logits with what the sampler takes."""
    text: Any = config.get_text_config(decoder=True)
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return int(tokens * (4 * text.hidden_size + 3 * intermediate) * dtype.itemsize + 3 * logit_rows * text.vocab_size * 4)


class Runner:
    """Execution of one variant, by one thread."""

    def __init__(
        self,
        executor: Executor,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        eos_ids: Collection[int],
        max_model_len: int,
        tokenizer_dir: Path,
    ) -> None:
        text: Any = config.get_text_config(decoder=True)
        self.executor = executor
        self.grammars = Grammars(tokenizer_dir)
        self.vocab_size = int(text.vocab_size)
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.dtype = dtype
        self.device = device
        self.scheduler: Scheduler | None = None  # while a cache is open
        self.cost = StepCost()
        self.limits = Limits(scored_tokens=max(1, min(Limits.step_tokens, _LOGIT_ELEMENTS // self.vocab_size)))
        rows = max(self.limits.sequences, self.limits.scored_tokens)
        self.workspace_bytes = workspace_bytes(config, dtype, self.limits.step_tokens, rows) + executor.held_bytes

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.executor.cache_dtype

    def kv_bytes(self, blocks: int) -> int:
        return blocks * self.executor.bytes_per_block

    def cache_blocks(self, room: int, tokens: int) -> int:
        """Blocks of the cache to make in `room` bytes for a request of `tokens`, which is served in any case.

        No more than the tokens of _CACHE_TOKENS or one sequence of the greatest length need, and than half of the room, so that other
        variants find some too, except where the greatest length needs more.
        """
        longest = self._blocks(self.max_model_len)
        available = max(0, room) // self.executor.bytes_per_block
        sensible = min(max(longest, self._blocks(_CACHE_TOKENS)), max(longest, available // 2))
        return max(self._blocks(tokens), min(sensible, available))

    def open_cache(self, blocks: int) -> None:
        """Make a cache of `blocks` blocks and an empty scheduler over it."""
        self.executor.allocate(blocks)
        self.scheduler = Scheduler(BlockPool(blocks), self.executor.block_size, self.limits)

    def close_cache(self) -> None:
        """Give the cache's memory back; without one, nothing happens."""
        if self.scheduler is not None:
            assert not self.scheduler.busy, "a cache that sequences use stays"
            self.scheduler = None
            self.executor.allocate(0)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.executor.block_size)

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

    def check_fits(self, request: Request) -> None:
        """Raises OutOfMemory where the open cache could never hold the request."""
        assert self.scheduler is not None, "there is a cache to fit into"
        tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not self.scheduler.fits(tokens):
            raise OutOfMemory(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens={request.sampling.max_tokens} need {self._blocks(tokens)} "
                f"blocks of the KV cache, which has {self.scheduler.total_blocks}: shorten the prompt, ask for fewer tokens, unload a "
                "variant, or raise PRECIS_MEMORY_BUDGET_BYTES"
            )

    def end_ids(self, request: Request) -> frozenset[int]:
        """Tokens that end this request's text."""
        stops = frozenset(request.sampling.stop_token_ids)
        return stops if request.sampling.ignore_eos else stops | self.eos_ids

    def sampler(self, request: Request, grammar: Compiled | None) -> Sampler:
        """`grammar` is the request's own copy of what it must follow."""
        end_ids, constraint = self.end_ids(request), None
        if grammar is not None:
            constraint = Constraint(grammar, vocab_size=self.vocab_size, end_ids=end_ids, device=self.device)
        return Sampler(
            request.sampling,
            request.prompt_token_ids,
            end_ids=end_ids,
            device=self.device,
            constraint=constraint,
        )
