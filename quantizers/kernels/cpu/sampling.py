"""Of rows of logits: the next tokens by temperature, top-k, top-p, min-p and a random number, and probabilities (native/choose.inc)."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.structs import Draw

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
_ROWS_OF_THREAD = 8  # fewer are done before another thread has come
_MOST = (1 << 31) - 1  # a larger top-k is none


class Filters(NamedTuple):
    """From which tokens one is drawn. They cut in this order."""

    temperature: float  # 0: the largest logit's, the first of these
    top_k: int = 0  # the likeliest; 0: all
    top_p: float = 1.0  # the fewest likeliest that have this share of the mass
    min_p: float = 0.0  # those at least as likely as this share of the likeliest


class Choice(NamedTuple):
    """How `NativeStep.decode` chooses the tokens of one sequence."""

    filters: Filters
    u: Sequence[float]  # of each round; of none where the temperature is 0
    ends: Sequence[int]  # tokens after which nothing follows


def choose(rows: Sequence[Tensor], filters: Sequence[Filters], u: Sequence[float]) -> list[int]:
    """Of each row, fp32 [vocab] on the host and contiguous, the first token, by id, up to which the mass exceeds the share `u` (in [0, 1)).

    Every temperature is above 0: who wants the largest logit has found it elsewhere. Masses are fp32, the same to the bit on every
    processor and whatever the other rows are; a logit of -inf has none, nor has one 87 temperatures below the largest. -1 where a logit is
    NaN or positive infinity, or all are -inf. Raises MemoryError.
    """
    draws = (Draw * len(rows))()
    for draw, row, kept, share in zip(draws, rows, filters, u, strict=True):
        assert row.dtype == torch.float32 and row.dim() == 1 and row.is_contiguous()
        draw.logits, draw.vocab = row.data_ptr(), len(row)
        describe(draw, kept, share)
    tokens = np.empty(len(rows), np.int32)
    library.call(library.library().precis_choose, ctypes.addressof(draws), len(rows), tokens.ctypes.data, library.threads())
    found: list[int] = tokens.tolist()
    return found


def describe(draw: Draw, filters: Filters, u: float) -> None:
    """All of `draw` but its logits."""
    draw.u, draw.top_k = u, min(filters.top_k, _MOST)
    draw.temperature, draw.top_p, draw.min_p = filters.temperature, filters.top_p, filters.min_p


def log_probabilities(logits: Tensor, token_ids: Sequence[int], top: int) -> tuple[list[float], Int32, Float32]:
    """Of each row of `logits`, fp32 [rows, vocab] on the host and contiguous: the natural logarithm of the probability of its token of
    `token_ids`, and of the `top` likeliest ones, at most the vocabulary, as ids and values [rows, top]; of equal ones the first come first.

    Sums are fp32 in parts of 64 and fp64 over these, the same to the bit on every processor. NaN where a logit is NaN or positive infinity,
    or all are negative infinity. Raises MemoryError.
    """
    assert logits.dtype == torch.float32 and logits.dim() == 2 and logits.is_contiguous()
    rows, vocab = logits.shape
    tokens = np.array(token_ids, np.int32)
    assert tokens.shape == (rows,) and (tokens >= 0).all() and (tokens < vocab).all()
    top = min(top, vocab)
    own, ids, values = np.empty(rows, np.float32), np.empty((rows, top), np.int32), np.empty((rows, top), np.float32)
    addresses = [array.ctypes.data for array in (own, ids, values)]
    threads = max(1, min(library.threads(), rows // _ROWS_OF_THREAD))
    library.call(library.library().precis_log_probabilities, logits.data_ptr(), rows, vocab, tokens.ctypes.data, top, *addresses, threads)
    found: list[float] = own.tolist()
    return found, ids, values
