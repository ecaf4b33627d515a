"""Text to token ids and back for one checkpoint, without torch.

transformers' `TokenizersBackend` reads the folder (its special tokens, its chat template); the text of tokens is what the Rust
tokenizer inside it says, with special tokens skipped and no clean-up of spaces, so that text only ever grows at its end.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import anyio.to_thread
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from quantizers.errors import CorruptData, InvalidInput
from server.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, byte_level_bytes

LONG_TEXT = 4096  # characters; below this, encoding takes less time (about 1 ms) than it is worth to change threads
CONTEXT_TOKENS = 6  # of the prompt, for decoders that look at neighbours; one is enough for all known ones, unless it is half a character


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`. Raises CorruptData where the folder holds none that can be read."""

    def __init__(self, folder: Path) -> None:
        try:
            self.backend = TokenizersBackend.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptData(
                f"the tokenizer of checkpoint {folder.name!r} cannot be read ({error}): import the checkpoint again"
            ) from error
        self._rust = self.backend.backend_tokenizer
        self._added: dict[int, str] = {index: token.content for index, token in self.backend.added_tokens_decoder.items()}
        self.special_ids = frozenset(self.backend.all_special_ids) | {
            index for index, token in self.backend.added_tokens_decoder.items() if token.special
        }
        self._byte_level = type(self._rust.decoder).__name__ == "ByteLevel"

    @property
    def chat_template(self) -> str | None:
        template = self.backend.chat_template
        return template if isinstance(template, str) else (template or {}).get("default")

    @property
    def tool_template(self) -> str | None:
        """The template that is used where there are tools: one of its own, or the chat template."""
        template = self.backend.chat_template
        return self.chat_template if isinstance(template, str) else (template or {}).get("tool_use", self.chat_template)

    def special_id(self, name: str) -> int | None:
        """Id of the special token `name`, which text does not show; None where that is ordinary text."""
        return next((token_id for token_id, text in self._added.items() if text == name and token_id in self.special_ids), None)

    def encode_now(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the checkpoint puts around every text (a first token, say)."""
        return list(self._rust.encode(text, add_special_tokens=special).ids)

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """`encode_now`, in a thread where the text is long: the event loop never waits for it."""
        if len(text) <= LONG_TEXT:
            return self.encode_now(text, special=special)
        return await anyio.to_thread.run_sync(functools.partial(self.encode_now, text, special=special))

    def decode(self, token_ids: list[int]) -> str:
        """The text of all tokens at once: what a Detokenizer's pieces add up to."""
        return str(self._rust.decode(token_ids, skip_special_tokens=True))

    def detokenizer(self, before: Sequence[int] = (), *, shown: str | None = None) -> Detokenizer:
        """A fresh one for the tokens that follow `before`, special tokens skipped, except where `shown` is the name of one."""
        if shown is not None and self.special_id(shown) is not None:
            return self._naming_detokenizer(before[-CONTEXT_TOKENS:])
        if self._byte_level:
            return ByteLevelDetokenizer(self._piece_bytes)
        return WindowDetokenizer(self.decode, before[-CONTEXT_TOKENS:])

    def place(self, token_ids: Sequence[int], text: str | None = None) -> tuple[str, list[int]]:
        """The tokens' text, special tokens by name, and where in it each token begins, in characters.

        `text` is what the ids were made from, where they were; what the tokenizer put before it then counts no characters.
        """
        detokenizer = self._naming_detokenizer()
        pieces: list[str] = []
        starts: list[int] = []
        length = 0
        for token_id in token_ids:
            starts.append(length)
            pieces.append(detokenizer.add(token_id))
            length += len(pieces[-1])
        whole = "".join([*pieces, detokenizer.finish()])
        if text is None or not whole.endswith(text):
            return whole, starts
        added = len(whole) - len(text)
        return text, [max(0, start - added) for start in starts]

    def _naming_detokenizer(self, before: Sequence[int] = ()) -> Detokenizer:
        if self._byte_level:
            return ByteLevelDetokenizer(self.token_bytes)
        return WindowDetokenizer(lambda ids: str(self._rust.decode(ids, skip_special_tokens=False)), before)

    def _piece_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text: nothing for a special token or an id without a token."""
        return b"" if token_id in self.special_ids else self.token_bytes(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; a special token's are its name's (`<|im_end|>`), an id without a token has none.

        Tokenizers that are not byte-level give the token's text in UTF-8, a byte-fallback token (`<0xE2>`) its one byte.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._rust.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return byte_level_bytes(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """The token as a string; a part of a character shows as U+FFFD (its bytes are `token_bytes`)."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_label(self, token_id: int) -> str:
        """The token as OpenAI's completions name it: its text, or `bytes:\\xe2\\x80` for a part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included; the model's output matrix may have more rows."""
        return len(self.backend)


def check_text(text: str, param: str) -> None:
    """Raises InvalidInput for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{param} holds half of a surrogate pair (at character {error.start}), which is no text: send whole characters", param=param
        ) from error
