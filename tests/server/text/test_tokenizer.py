"""Tokens to text, piece by piece, against the whole decoding by the tokenizers library; templates; stop strings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from quantizers.errors import CorruptData
from server.engine.interface import Token
from server.text.continuation import Continuation
from server.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, byte_level_bytes
from server.text.stop import StopStrings
from server.text.tokenizer import Tokenizer

SCRIPTS = st.text(alphabet="ab .\n'é\u0301ü鳥飛が한국어👩‍🚀🎉🇫🇷\u200dनमस्ते\u05d0\U0001f3fd", max_size=40) | st.text(max_size=30)


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Tokenizer:
    return Tokenizer(demo)


def spelled(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary has all of the text: the demo's lacks a few bytes that begin no assigned character, such as 0xF1."""
    return tokenizer.decode(tokenizer.encode_now(text)) == text


def pieces(detokenizer: Any, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(text=SCRIPTS)
def test_pieces_of_any_text_add_up_and_split_no_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode_now(text)
    out = pieces(tokenizer.detokenizer(), token_ids)
    assert "".join(out) == tokenizer.decode(token_ids)
    assume(spelled(tokenizer, text))
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out) or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 49151), max_size=40))
def test_pieces_of_any_tokens_add_up_to_the_whole_decoding(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces(tokenizer.detokenizer(), token_ids)) == tokenizer.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(token_ids=st.lists(st.sampled_from([*range(0, 20), *range(100, 300)]), max_size=40))
def test_single_bytes_and_special_tokens_too(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces(tokenizer.detokenizer(), token_ids)) == tokenizer.decode(token_ids)


def test_the_byte_alphabet_is_the_libraries_own() -> None:
    assert sorted(byte_level_bytes(character)[0] for character in pre_tokenizers.ByteLevel.alphabet()) == list(range(256))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("é 鳥\n\t", "\x00\x7f\x80\xad\xff", "👩‍🚀"):
        assert byte_level_bytes(split.pre_tokenize_str(text)[0][0]) == text.encode()


def sentencepiece_like() -> RustTokenizer:
    """Words with a leading mark, a byte fallback and a stripped first space, as Llama 2's tokenizer.json decodes."""
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3, "▁": 4} | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    rust = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return rust


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(["H", "W", "!", "é", "🎉", "鳥"]), max_size=12))
def test_window_detokenizer_on_a_sentencepiece_decoder(words: list[str]) -> None:
    rust = sentencepiece_like()
    ids = {"H": [1], "W": [2], "!": [3]}
    token_ids = [token for word in words for token in ids.get(word, [5 + byte for byte in word.encode()])]
    out = pieces(WindowDetokenizer(rust.decode), token_ids)
    assert "".join(out) == rust.decode(token_ids)
    assert not any("\ufffd" in piece for piece in out)


def test_window_detokenizer_keeps_the_space_after_a_prompt() -> None:
    detokenizer = WindowDetokenizer(sentencepiece_like().decode, [1])
    assert detokenizer.add(2) == " world"


def test_unfinished_character_comes_out_as_a_replacement(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode_now("👩")[:-1]
    assert "".join(pieces(tokenizer.detokenizer(), token_ids)) == tokenizer.decode(token_ids) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(text=SCRIPTS)
def test_token_bytes_add_up_and_places_are_where_tokens_begin(tokenizer: Tokenizer, text: str) -> None:
    assume(spelled(tokenizer, text))
    token_ids = tokenizer.encode_now(text)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids) == text.encode()
    whole, starts = tokenizer.place(token_ids, text)
    assert whole == text
    for token_id, start in zip(token_ids, starts, strict=True):
        label = tokenizer.token_label(token_id)
        assert label.startswith("bytes:") or text.startswith(label, start)


def test_special_tokens_have_names_and_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(2) == tokenizer.token_label(2) == "<|im_end|>"
    assert tokenizer.detokenizer().add(2) == ""
    assert tokenizer.place([2, 28120])[0].startswith("<|im_end|>")


def test_ids_without_a_token_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(49152 + 100) == b""


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="import the checkpoint again"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptData):
        Tokenizer(tmp_path)


def test_the_http_process_imports_no_torch() -> None:
    code = "import sys, server.app, server.text.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def reference_cut(text: str, stops: list[str]) -> str:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_does(chunks: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    out = ""
    for chunk in chunks:
        out += stop.add(chunk)
        if stop.matched:
            break
        seen = "".join(chunks)
        assert seen.startswith(out)
    else:
        out += stop.finish()
    full = "".join(chunks)
    # Where two stop strings end in different chunks the one that ends first is found first, as it must be in a stream.
    if not stop.matched:
        assert out == full and not any(each in full for each in stops)
    else:
        assert any(full.startswith(each, len(out)) for each in stops) and full.startswith(out)
    if len(stops) == 1:
        assert out == reference_cut(full, stops)


def test_stop_strings_hold_back_only_what_may_begin_one() -> None:
    stop = StopStrings(["\n\nUser:"])
    assert [stop.add(piece) for piece in ("Hi", " there\n", "\nUs", "ual", "\n\nUser", ": x")] == ["Hi", " there", "", "\n\nUsual", "", ""]
    assert stop.matched


@settings(max_examples=200, deadline=None)
@given(text=SCRIPTS, stops=st.lists(st.text(alphabet="ab é鳥", min_size=1, max_size=3), max_size=2), least=st.integers(0, 5))
def test_continuation_shows_every_token_with_its_text(tokenizer: Tokenizer, text: str, stops: list[str], least: int) -> None:
    assume(spelled(tokenizer, text))
    token_ids = tokenizer.encode_now(text)
    continuation = Continuation(tokenizer.detokenizer(), stops, least)
    shown = []
    for token_id in token_ids:
        shown.append(continuation.add(Token(token_id=token_id)))
        if continuation.stopped:
            break
    else:
        shown.append(continuation.finish())
    out = "".join(each.text for each in shown)
    tokens = [placed for each in shown for placed in each.tokens]
    assert text.startswith(out)
    assert [placed.token.token_id for placed in tokens] == token_ids[: len(tokens)]
    assert all(placed.start < len(out) or placed.start == placed.end for placed in tokens)
    if not continuation.stopped:
        assert out == text and len(tokens) == len(token_ids)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    continuation = Continuation(tokenizer.detokenizer(), [" a"], min_tokens=3)
    token_ids = tokenizer.encode_now("x a a a a")
    out = ""
    for token_id in token_ids:
        out += continuation.add(Token(token_id=token_id)).text
        if continuation.stopped:
            break
    assert out == "x a a"


def test_byte_level_detokenizer_replaces_what_is_no_utf8() -> None:
    detokenizer = ByteLevelDetokenizer(lambda token_id: bytes([token_id]))
    assert pieces(detokenizer, [0xE2, 0x82, 0x41, 0xFF]) == ["", "", "\ufffdA", "\ufffd", ""]
