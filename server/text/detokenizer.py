"""Text of a growing sequence of tokens, piece by piece: the pieces add up to the decoding of the whole.

A character may be spread over several tokens, so text comes out only when its last byte is there; bytes that can never become a
character come out as U+FFFD, as in a full decoding.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    def add(self, token_id: int) -> str:
        """The text that is certain after one more token; empty while a character is unfinished."""
        ...

    def finish(self) -> str:
        """What is left when no more tokens follow: an unfinished character as U+FFFD."""
        ...


def _byte_level_alphabet() -> dict[str, int]:
    """The 256 characters in which byte-level BPE spells bytes: printable Latin-1 stands for itself, the rest is moved up from U+0100.

    Radford et al. 2019 (GPT-2), section 2.2; the table is fixed by every vocabulary that uses it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(moved)}


_ALPHABET = _byte_level_alphabet()


def byte_level_bytes(piece: str) -> bytes:
    """Bytes of a vocabulary entry. One with a character outside the alphabet (an added token, a plain space) is its own UTF-8."""
    try:
        return bytes([_ALPHABET[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8")


class ByteLevelDetokenizer:
    """For byte-level vocabularies: each token is known bytes, so the text is their incremental UTF-8 decoding."""

    def __init__(self, piece_bytes: Callable[[int], bytes]) -> None:
        self._piece_bytes = piece_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._piece_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder (SentencePiece, WordPiece): decodes a short window of tokens before and after the newest and takes the
    difference, because such decoders join tokens by their neighbours. `before` are the last tokens of the prompt: without them the
    first word would lose its space."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids: list[int] = list(before)
        self._start = 0  # the window's first token
        self._read = len(self._ids)  # tokens whose text is out

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]
