"""What a method is calibrated on, as data: every source, and every wrong one by name with its remedy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_store.store import Store
from quantizers.errors import InvalidInput
from server.calibration import CalibrationOptions, TextFile, calibration_options, find_file, read_documents, read_text
from server.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "What is a quant?"}, {"role": "assistant", "content": "A number."}]


@pytest.fixture(scope="module")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer(demo)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data") as store:
        yield store


def written(path: Path, *lines: Any) -> TextFile:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return TextFile(path, path.name)


def test_documents_are_texts_and_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = written(tmp_path / "documents.jsonl", {"text": "One two three."}, "", {"messages": CHAT})
    documents, digest = read_documents(file, tokenizer)
    assert documents[0] == tokenizer.encode_now("One two three.")
    shown = tokenizer.backend.apply_chat_template(CHAT, tokenize=False)
    assert documents[1] == tokenizer.encode_now(shown, special=False) and len(documents) == 2
    assert len(digest) == 64 and file.is_jsonl


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ('"text"', "it is no document: write"),
        ({}, "it is no document"),
        ({"text": "a", "messages": CHAT}, "it is no document"),
        ({"text": "a", "label": 1}, "it is no document"),
        ({"text": 5}, "its text is no string"),
        ({"text": " \n"}, "it is empty: leave the line out"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"messages": []}, "no list of messages"),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": [{"role": "user"}]}, "a role and a content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "a role and a content"),
    ],
)
def test_bad_lines_are_named_by_number(tmp_path: Path, tokenizer: Tokenizer, line: Any, message: str) -> None:
    file = written(tmp_path / "bad.jsonl", {"text": "fine"}, "", line, {"text": "fine"})
    with pytest.raises(InvalidInput, match=f"^line 3 of 'bad.jsonl': .*{message}") as failure:
        read_documents(file, tokenizer)
    assert failure.value.param == "calibration"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; name a text file"),
        (b"", "is empty: give a text"),
        (b" \n\n", "is empty: give a text"),
        (b"\xff\xfe\x00a", r"is no UTF-8 text \(byte 0\)"),
        (b"ELF\0\0\0", "holds NUL characters, so it is no text but a binary file"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=rf"some\.txt' {message}") as failure:
        read_text(TextFile(path, path.name), "calibration")
    assert failure.value.param == "calibration"


def test_a_folder_and_a_file_of_any_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: Is a directory"):
        read_text(TextFile(tmp_path, tmp_path.name), "calibration")
    huge = tmp_path / "huge.txt"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidInput, match=r"huge\.txt' has 1099511627776 bytes, more than the 268435456 that are read: cut it"):
        read_text(TextFile(huge, huge.name), "calibration")


def test_an_uploads_name_says_what_is_in_it(store: Store, tmp_path: Path) -> None:
    upload = store.uploads.create("talks.jsonl", 5, "application/jsonl", "user_data")
    part = store.uploads.add_part_from(upload.id, [b'{"a"}'])
    file = store.uploads.complete(upload.id, [part.id]).file
    assert file is not None
    found = find_file(file.id, store.files)
    assert found.is_jsonl and found.path.read_bytes() == b'{"a"}'
    assert find_file(str(tmp_path / "plain.txt"), store.files) == TextFile(tmp_path / "plain.txt", "plain.txt")
    assert find_file("file-123", store.files).path == Path("file-123")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": -3}, "samples"),
        ({"samples": 1 << 30}, "samples"),
        ({"length": 1}, "length"),
        ({"seed": -1}, "seed"),
        ({"source": ""}, "source"),
    ],
)
def test_sizes_that_make_no_calibration(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{param} of the calibration is ") as failure:
        calibration_options(**given)
    assert failure.value.param == param


def test_nothing_given_is_the_default() -> None:
    assert calibration_options(source=None, samples=None) is None
    assert calibration_options(samples=3) == CalibrationOptions(source="pydoc", samples=3, length=512, seed=None)
