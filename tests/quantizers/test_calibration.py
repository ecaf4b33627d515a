"""The default texts are disjoint parts of Python's own topics, and windows are whole."""

from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizers.calibration import Text, calibration_text, evaluation_text, token_windows
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
