"""Texts to calibrate and to measure with, and the token windows cut from them. Nothing here reads a file or knows a tokenizer.

The default text is what every Python has: the topics of `pydoc_data`, of which every fourth measures and the others calibrate, so that
no method is measured on what it saw. It differs a little between Python versions, hence the version in its name.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantizers.errors import InvalidInput

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Text:
    """A text by name, so that two reports are compared only where they measured the same one."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def evaluation_text() -> Text:
    """The default text to measure with: topics 1, 5, 9, ... in alphabetical order, joined by blank lines."""
    return Text(f"pydoc-{sys.version_info.major}.{sys.version_info.minor}-evaluation", _topics(lambda index: index % 4 == 1))


def calibration_text() -> Text:
    """The default text to calibrate with: the other topics."""
    return Text(f"pydoc-{sys.version_info.major}.{sys.version_info.minor}-calibration", _topics(lambda index: index % 4 != 1))


def _topics(chosen: Callable[[int], bool]) -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for index, key in enumerate(sorted(topics)) if chosen(index))


def token_windows(encode: Callable[[str], list[int]], text: Text, *, length: int, count: int) -> "torch.Tensor":
    """int64 [windows, length]: the first `count` whole windows of the text, without overlap; fewer where it ends sooner.

    Raises InvalidInput where the text has less than one window or the sizes make none.
    """
    import torch

    if length < 2 or count < 1:
        raise InvalidInput(
            f"{count} windows of {length} tokens measure nothing: use at least 1 window of at least 2 tokens", param="window"
        )
    tokens = encode(text.content)
    whole = min(len(tokens) // length, count)
    if whole == 0:
        raise InvalidInput(f"the text {text.name!r} has {len(tokens)} tokens, less than one window of {length}: give a longer text")
    return torch.tensor(tokens[: whole * length], dtype=torch.int64).view(whole, length)


SAMPLES = 64
SAMPLE_TOKENS = 512


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a method that needs data is shown. Raises InvalidInput where the tokens are none.

    tokens: int64 [samples, length]; mask: int64 of that shape, 1 for a token, 0 for padding, which no statistic counts.
    source and sha256 name the text that they came from, and seed what was drawn from it; they go into the variant's manifest.
    """

    tokens: "torch.Tensor"
    mask: "torch.Tensor"
    source: str
    sha256: str
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.numel() == 0 or self.tokens.shape != self.mask.shape:
            raise InvalidInput(
                f"calibration tokens are [samples, length] with a mask of that shape, not {list(self.tokens.shape)} and "
                f"{list(self.mask.shape)}: give at least one sample",
                param="calibration",
            )
        if not bool((self.mask.sum(1) > 0).all()):
            raise InvalidInput("a calibration sample is all padding: leave it out", param="calibration")

    def first(self, samples: int) -> "Calibration":
        """The first so many samples, or all where there are fewer."""
        return Calibration(self.tokens[:samples], self.mask[:samples], self.source, self.sha256, self.seed)

    @property
    def facts(self) -> dict[str, str | int]:
        """What the manifest records."""
        samples, length = self.tokens.shape
        facts: dict[str, str | int] = {"source": self.source, "sha256": self.sha256, "samples": samples, "length": length}
        facts["tokens"] = int(self.mask.sum())
        return facts if self.seed is None else {**facts, "seed": self.seed}


def calibrate_on(
    encode: Callable[[str], list[int]], text: Text, *, samples: int = SAMPLES, length: int = SAMPLE_TOKENS, seed: int | None = None
) -> Calibration:
    """`samples` windows of `length` tokens: the first of `text` in order, or with a seed as many drawn from all of its windows.

    Raises InvalidInput where the text has fewer windows than that, or the sizes make none: fewer samples than were asked for would be
    another calibration under the same name.
    """
    import torch

    windows = token_windows(encode, text, length=length, count=samples if seed is None else len(text.content) // 2 + 1)
    if len(windows) < samples:
        raise InvalidInput(
            f"the text {text.name!r} has {len(windows)} windows of {length} tokens, fewer than {samples}: "
            "give a longer text, fewer samples or a shorter length",
            param="samples",
        )
    windows = windows[_chosen(len(windows), samples, seed)]
    return Calibration(windows, torch.ones_like(windows), text.name, text.sha256, seed)


def calibrate_on_documents(
    documents: Sequence[Sequence[int]],
    name: str,
    sha256: str,
    *,
    samples: int = SAMPLES,
    length: int = SAMPLE_TOKENS,
    seed: int | None = None,
) -> Calibration:
    """A sample a document, given as its tokens: cut to `length`, or padded where it is shorter. The first ones, or drawn with a seed.

    Raises InvalidInput where there are fewer documents than samples.
    """
    import torch

    if len(documents) < samples:
        raise InvalidInput(
            f"{name!r} has {len(documents)} documents, fewer than the {samples} samples: give more documents or ask for fewer samples",
            param="samples",
        )
    tokens, mask = torch.zeros(samples, length, dtype=torch.int64), torch.zeros(samples, length, dtype=torch.int64)
    for row, index in enumerate(_chosen(len(documents), samples, seed).tolist()):
        document = torch.tensor(documents[index][:length], dtype=torch.int64)
        tokens[row, : len(document)], mask[row, : len(document)] = document, 1
    return Calibration(tokens, mask, name, sha256, seed)


def _chosen(available: int, samples: int, seed: int | None) -> "torch.Tensor":
    """int64 [samples], positions: the first ones, or with a seed as many drawn from all."""
    import torch

    if seed is None:
        return torch.arange(samples)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
