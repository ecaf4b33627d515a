"""Which tokens a method with calibration is shown: the choice as plain data, for the command line and for jobs, and the texts it names.

Everything here is data and files; whoever makes tokens of it imports torch.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.files import Files
from quantizers.calibration import SAMPLE_TOKENS, SAMPLES, Text
from quantizers.errors import InvalidInput, NotFound
from server.text.chat import render_chat
from server.text.tokenizer import Tokenizer, check_text

DEFAULT, SELF = "pydoc", "self"
MAX_SAMPLES, MAX_LENGTH = 1 << 16, 1 << 20
LARGEST_TEXT = 256 << 20  # bytes; thousands of times what methods look at


class CalibrationOptions(BaseModel):
    """source: `pydoc`, the default text; `self`, text that the model writes; else a UTF-8 text or JSONL file, by path or id of its upload.

    samples x length tokens. Without a seed they are the text's first, with one they are drawn from all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(default=DEFAULT, min_length=1, max_length=4096)
    samples: int = Field(default=SAMPLES, ge=1, le=MAX_SAMPLES)
    length: int = Field(default=SAMPLE_TOKENS, ge=2, le=MAX_LENGTH)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)


def calibration_options(**given: Any) -> CalibrationOptions | None:
    """Those of the `given` options that are not None; None where all are. Raises InvalidInput naming the first that is wrong."""
    chosen = {name: value for name, value in given.items() if value is not None}
    try:
        return CalibrationOptions(**chosen) if chosen else None
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InvalidInput(f"{name} of the calibration is {first['input']!r}: {first['msg']}", param=name) from error


@dataclass(frozen=True)
class TextFile:
    """A file to read tokens from, and the name that it was given by its owner, whose ending says what is in it."""

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        return self.name.lower().endswith(".jsonl")


def find_file(source: str, uploads: Files) -> TextFile:
    """The file that `source` names: an upload's id, or else a path."""
    with suppress(NotFound):
        return TextFile(uploads.path(source), uploads.get(source).filename)
    return TextFile(Path(source), Path(source).name)


def read_text(file: TextFile, param: str) -> Text:
    """Raises InvalidInput for what is missing, empty, too large or no text; `param` is the option that named it."""
    shown = repr(file.name if file.path.name != file.name else str(file.path))
    try:
        size = file.path.stat().st_size
        if size > LARGEST_TEXT:
            raise InvalidInput(f"{shown} has {size} bytes, more than the {LARGEST_TEXT} that are read: cut it", param=param)
        content = file.path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{shown} cannot be read: {error.strerror or error}; name a text file", param=param) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{shown} is no UTF-8 text (byte {error.start}): name a text file", param=param) from error
    if "\0" in content:
        raise InvalidInput(f"{shown} holds NUL characters, so it is no text but a binary file: name a text file", param=param)
    if not content.strip():
        raise InvalidInput(f"{shown} is empty: give a text of some thousand words", param=param)
    return Text(file.name, content)


def read_documents(file: TextFile, tokenizer: Tokenizer) -> tuple[list[list[int]], str]:
    """Tokens of each document of a JSONL file, in its order, and the file's sha256.

    A line is `{"text": "..."}` or `{"messages": [...]}`, which the checkpoint's chat template renders. Raises InvalidInput naming the
    number of the first line that is neither.
    """
    text = read_text(file, "calibration")
    documents = asyncio.run(_documents(text, tokenizer))
    return documents, text.sha256


async def _documents(text: Text, tokenizer: Tokenizer) -> list[list[int]]:
    documents = []
    for number, line in enumerate(text.content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            tokens = await _tokens(line, tokenizer)
        except InvalidInput as error:
            raise InvalidInput(f"line {number} of {text.name!r}: {error.message}", param="calibration") from error
        documents.append(tokens)
    return documents


async def _tokens(line: str, tokenizer: Tokenizer) -> list[int]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"it is no JSON ({error})") from error
    if not isinstance(document, dict) or set(document) not in ({"text"}, {"messages"}):
        raise InvalidInput('it is no document: write {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}')
    if "text" in document:
        text, special = document["text"], True
        if not isinstance(text, str):
            raise InvalidInput("its text is no string")
    else:
        text, special = await render_chat(tokenizer, _messages(document["messages"]), opens_turn=False), False
    check_text(text, "it")
    tokens = tokenizer.encode_now(text, special=special)
    if not text.strip() or not tokens:
        raise InvalidInput("it is empty: leave the line out")
    return tokens


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidInput("its messages are no list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidInput("a message has a role and a content, both strings")
    return value
