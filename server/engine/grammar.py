"""Grammars that an answer must follow: compiled once, and the tokens that they allow next, found while the model computes.

llguidance (https://github.com/guidance-ai/llguidance) does both over the vocabulary of the checkpoint's own tokenizer: an Earley
parser over lexemes that are derivatives of regular expressions, so that a mask takes tens of microseconds. Which grammar a request has
is `server.text.grammar`'s matter.
"""

from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from quantizers.errors import InvalidInput, PrecisError
from server.text.tokenizer import Tokenizer

_KEPT = 64  # compiled grammars of a checkpoint; one takes from kilobytes to a few megabytes
_LIMITS = LLParserLimits(verbose_errors=False)  # its own, which bound a step to milliseconds; errors go to callers, not to developers

# One thread each: compiling may take seconds and must not hold up a mask, which is wanted before the step's logits are there.
_compiling = ThreadPoolExecutor(1, thread_name_prefix="grammars")
_masking = ThreadPoolExecutor(1, thread_name_prefix="masks")


class _Vocabulary:
    """What llguidance asks of a tokenizer, answered by ours, so that every tokenizer that is served can follow a grammar."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # It must have one end of text, and a checkpoint may have none or several: a token of no other use, behind all others.
        self.eos_token_id, self.bos_token_id = tokenizer.size, None
        self.tokens = [*(tokenizer.token_bytes(token_id) for token_id in range(tokenizer.size)), b"<end>"]
        self.special_token_ids = sorted({*tokenizer.special_ids, self.eos_token_id})

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_now(text.decode("utf-8", "replace"), special=False)


@dataclass(frozen=True)
class Compiled:
    """A matcher at the beginning of its grammar, over token ids 0 to `tokens` - 1."""

    matcher: LLMatcher
    tokens: int

    def copy(self) -> "Compiled":
        """One to advance."""
        return Compiled(self.matcher.deep_copy(), self.tokens)


class GrammarFailed(PrecisError):
    """The grammar cannot be followed any further: the parser's limits were passed on the way."""

    code = "grammar_failed"


class Grammars:
    """Compiled grammars over the tokenizer in `folder`, which is read when the first is asked for. May be used by any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._vocabulary: LLTokenizer | None = None  # of the compiling thread
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()  # likewise

    def compile(self, grammar: str) -> "Future[Compiled]":
        """`grammar` for one sequence, soon. The future raises InvalidInput where the grammar is wrong, CorruptData without a tokenizer."""
        return _compiling.submit(self._compile, grammar)

    def _compile(self, grammar: str) -> Compiled:
        if self._vocabulary is None:
            wrapper = TokenizerWrapper(_Vocabulary(Tokenizer(self._folder)))
            self._vocabulary = LLTokenizer(wrapper, slices=LLTokenizer.json_slices())
        if grammar not in self._compiled:
            matcher = LLMatcher(self._vocabulary, grammar, limits=_LIMITS, log_level=0)
            if matcher.is_error():
                raise InvalidInput(f"the answer's grammar cannot be used: {matcher.get_error()}", param="response_format")
            self._compiled[grammar] = Compiled(matcher, self._vocabulary.vocab_size - 1)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].copy()


class Constraint:
    """Where one sequence stands in its grammar."""

    def __init__(self, grammar: Compiled, *, vocab_size: int, end_ids: Collection[int], device: torch.device) -> None:
        """`grammar` is this sequence's own copy. `end_ids` may follow wherever the text could end; ids without a token never may."""
        self._matcher, self._vocab_size, self._device = grammar.matcher, vocab_size, device
        self._known = min(grammar.tokens, vocab_size)
        self._end_ids = sorted(end_ids)
        self._mask: Future[Tensor] | None = None

    @property
    def complete(self) -> bool:
        """Nothing can follow but the end."""
        return bool(self._matcher.is_stopped())

    @property
    def failure(self) -> GrammarFailed | None:
        """Why nothing is allowed any more, where that is the grammar's fault."""
        if not self._matcher.is_error():
            return None
        return GrammarFailed(f"the answer's grammar could not be followed to its end: {self._matcher.get_error()}; simplify the schema")

    def prepare(self) -> None:
        """Begin to find out what is allowed next; until `accept`, `forbidden` waits for that."""
        if self._mask is None:
            self._mask = _masking.submit(self._forbidden)

    def forbidden(self) -> Tensor:
        """bool [vocab]: tokens that may not come next. All of them where the grammar failed."""
        self.prepare()
        assert self._mask is not None
        return self._mask.result()

    def _forbidden(self) -> Tensor:
        allowed = np.zeros(self._vocab_size, bool)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if not self._matcher.is_error():
            allowed[: self._known] = bits[: self._known]
            if self._matcher.is_accepting():
                allowed[self._end_ids] = True
        return torch.from_numpy(~allowed).to(self._device)

    def accept(self, token_id: int) -> None:
        """`token_id` is the next one; one of `end_ids` is the last."""
        self._mask = None
        if token_id not in self._end_ids:
            self._matcher.consume_token(token_id)  # a failure shows in `failure`
