"""safetensors in and out, against the safetensors library; and its headers as an attacker writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model_store.formats.safetensors import SafetensorsSource, SafetensorsWriter
from model_store.formats.safetensors_header import parse_header, read_header
from quantizers.errors import InvalidInput, NotFound

TENSORS = {
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),  # an odd number of bytes first, so that alignment matters
    "bf16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "fp32": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
    "fp16": torch.tensor([float("inf"), -0.0, float("nan")]).half(),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "int64": torch.tensor(1 << 40),
    "flags": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
}
HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype and left.shape == right.shape and left.view(torch.uint8).equal(right.view(torch.uint8))
        if left.dim()
        else left.equal(right)
    )


def written(path: Path, header: Any, data: bytes = bytes(22)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_the_library_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path) as sink:
        for name, tensor in TENSORS.items():
            sink(name, tensor)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_writer_aligns_every_tensor_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path) as sink:
        for name, tensor in TENSORS.items():
            sink(name, tensor)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    for name, entry in read_header(path).items():
        assert entry.begin % TENSORS[name].element_size() == 0, name


def test_strides_are_written_as_values(tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).T
    with SafetensorsWriter(tmp_path / "x.safetensors") as sink:
        sink("t", tensor)
    assert load_file(tmp_path / "x.safetensors")["t"].equal(tensor)


def test_the_source_reads_what_the_library_wrote_over_several_files(tmp_path: Path) -> None:
    names = list(TENSORS)
    save_file({name: TENSORS[name] for name in names[:4]}, tmp_path / "1.safetensors")
    save_file({name: TENSORS[name] for name in names[4:]}, tmp_path / "2.safetensors")
    source = SafetensorsSource([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert set(source.keys()) == set(names)
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert source.bytes(name) == tensor.numel() * tensor.element_size()
        assert same(source.get(name), tensor)


def test_a_name_in_two_files_and_a_name_in_none(tmp_path: Path) -> None:
    for file in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(InvalidInput, match=r"'a' is in 1\.safetensors and again in 2\.safetensors"):
        SafetensorsSource([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    source = SafetensorsSource([tmp_path / "1.safetensors"])
    for read in (source.get, source.shape, source.dtype):
        with pytest.raises(NotFound, match="'b'"):
            read("b")


def test_a_name_is_written_once_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'a' is taken"), SafetensorsWriter(tmp_path / "x.safetensors") as sink:
        sink("a", torch.zeros(1))
        sink("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="complex64"), SafetensorsWriter(tmp_path / "x.safetensors") as sink:
        sink("a", torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 17]}}, "needs 16 bytes"),
        ({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}, "needs 16 bytes"),
        ({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [4, 20]}}, "begins at byte"),  # a gap, and an overlap with b
        ({"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 16]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}}, "shape"),
        ({"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}, "dtype"),
        ({"a": {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]}}, "dtype"),
        ({"a": {"dtype": "F32", "shape": [2, 2]}}, "exactly"),
        ({"a": []}, "exactly"),
        ({"b": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, "begins at byte"),
        ({"__metadata__": {"x": 1}}, "__metadata__"),
        ({"c": {"dtype": "U8", "shape": [5], "data_offsets": [22, 27]}}, "its data has 22"),
    ],
)
def test_headers_that_lie_are_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=why):
        read_header(written(tmp_path / "x.safetensors", {**HEADER, **change}))


@pytest.mark.parametrize(
    "content",
    [b"", b"short", (1 << 63).to_bytes(8, "little") + b"{}", (10).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
)
def test_files_that_are_no_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"x\.safetensors is not a whole"):
        read_header(path)


def test_json_that_names_twice_or_nests_deeply(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[22],"data_offsets":[0,22]}'
    for raw in (b"{" + entry + b"," + entry + b"}", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":\xff}'):
        with pytest.raises(InvalidInput, match="not valid JSON"):
            read_header(written(tmp_path / "x.safetensors", raw))


@given(st.data())
def test_mutated_headers_are_refused_or_read_as_the_library_reads_them(data: st.DataObject) -> None:
    """Any change of bytes ends in InvalidInput or in entries that fill the data exactly, never in another error."""
    raw = bytearray(json.dumps(HEADER).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = parse_header(bytes(raw), 22, Path("x.safetensors"))
    except InvalidInput:
        return
    assert sum(entry.bytes for entry in entries.values()) == 22
