"""The default texts are disjoint parts of Python's own topics, and windows are whole."""

from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.calibration import Calibration, Text, calibrate_on, calibrate_on_documents, calibration_text, evaluation_text, token_windows
from quantizers.errors import InvalidInput


def encode(content: str) -> list[int]:
    return list(content.encode())


def test_texts_are_disjoint_parts_of_the_topics() -> None:
    keys = sorted(topics)
    assert evaluation_text().content == "\n\n".join(topics[key] for key in keys[1::4])
    assert calibration_text().content == "\n\n".join(topics[key] for index, key in enumerate(keys) if index % 4 != 1)
    assert evaluation_text().sha256 != calibration_text().sha256 and evaluation_text().name.startswith("pydoc-3.")


@given(content=st.text(alphabet="ab", min_size=0, max_size=60), length=st.integers(2, 20), count=st.integers(1, 5))
def test_windows_are_the_texts_first_tokens_in_order(content: str, length: int, count: int) -> None:
    text = Text("letters", content)
    if len(content) < length:
        with pytest.raises(InvalidInput, match=f"'letters' has {len(content)} tokens, less than one window of {length}"):
            token_windows(encode, text, length=length, count=count)
        return
    windows = token_windows(encode, text, length=length, count=count)
    assert windows.shape == (min(len(content) // length, count), length)
    assert windows.flatten().tolist() == encode(content)[: windows.numel()]


@pytest.mark.parametrize(("length", "count"), [(1, 1), (0, 1), (-5, 1), (8, 0), (8, -1)])
def test_sizes_that_measure_nothing_are_refused(length: int, count: int) -> None:
    with pytest.raises(InvalidInput, match="measure nothing"):
        token_windows(encode, Text("letters", "a" * 100), length=length, count=count)


def test_samples_are_the_first_windows_or_drawn_by_the_seed() -> None:
    text = Text("letters", "".join(chr(97 + index % 26) for index in range(400)))
    first = calibrate_on(encode, text, samples=3, length=10)
    assert first.tokens.flatten().tolist() == encode(text.content)[:30] and bool(first.mask.all())
    assert first.facts == {"source": "letters", "sha256": text.sha256, "samples": 3, "length": 10, "tokens": 30}
    assert calibrate_on(encode, text, samples=3, length=10, seed=7).facts["seed"] == 7
    drawn, again, other = (calibrate_on(encode, text, samples=3, length=10, seed=seed) for seed in (1, 1, 2))
    assert drawn.tokens.equal(again.tokens) and not drawn.tokens.equal(other.tokens)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'letters' has 2 windows of 10 tokens, fewer than 3: give a longer text"):
        calibrate_on(encode, Text("letters", "a" * 29), samples=3, length=10)
    with pytest.raises(InvalidInput, match="'empty' has 0 tokens, less than one window"):
        calibrate_on(encode, Text("empty", ""), samples=3, length=10)


@pytest.mark.parametrize(("tokens", "mask"), [((0, 4), (0, 4)), ((2, 4), (2, 3)), ((4,), (4,))])
def test_calibration_that_holds_no_samples_is_refused(tokens: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"calibration tokens are \[samples, length\]"):
        Calibration(torch.zeros(tokens, dtype=torch.int64), torch.ones(mask, dtype=torch.int64), "text", "0")


def test_a_sample_of_padding_alone_is_refused() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(InvalidInput, match="is all padding"):
        Calibration(torch.ones_like(mask), mask, "text", "0")


def test_documents_are_cut_or_padded() -> None:
    documents = [[5, 6, 7, 8, 9], [4], [1, 2, 3]]
    first = calibrate_on_documents(documents, "documents", "0", samples=2, length=3)
    assert first.tokens.tolist() == [[5, 6, 7], [4, 0, 0]] and first.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert first.facts == {"source": "documents", "sha256": "0", "samples": 2, "length": 3, "tokens": 4}
    drawn = [calibrate_on_documents(documents, "documents", "0", samples=3, length=3, seed=seed) for seed in range(8)]
    assert {int(each.mask.sum()) for each in drawn} == {7} and len({str(each.tokens.tolist()) for each in drawn}) > 1
    assert drawn[3].facts["seed"] == 3
    with pytest.raises(InvalidInput, match=r"'documents' has 3 documents, fewer than the 4 samples: give more documents or ask for fewer"):
        calibrate_on_documents(documents, "documents", "0", samples=4, length=3)
