"""The header of a safetensors file, read as a hostile one: eight bytes of length, JSON, then the data that the offsets divide.

    [0, 8)           N, little endian
    [8, 8 + N)       {"__metadata__": {...}, name: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ...}
    [8 + N, end)     data; offsets are relative to here, and the tensors fill it without gap or overlap

No torch: the HTTP process checks uploads with this.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantizers.errors import InvalidInput

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound
MAX_ELEMENTS = 1 << 48  # beyond any model; keeps products of hostile shapes out of the arithmetic below

# bits an element, by the format's names
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its dtype in the format's words, its shape, and its bytes [begin, end) counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of `path` by name, in the order of the data. Raises InvalidInput, naming the file, for anything out of order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"a header of {length} bytes does not fit the file's {size} bytes")
        raw = file.read(length)
    return parse_header(raw, size - 8 - length, path)


def parse_header(raw: bytes, data_bytes: int, path: Path) -> dict[str, TensorEntry]:
    """The entries of the JSON `raw`, checked against `data_bytes` of data. `path` is for messages alone. Raises InvalidInput."""
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _broken(path, "its header is not valid JSON, or names a tensor twice") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ is not an object of strings")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise _broken(path, f"tensor {name!r} begins at byte {entry.begin} of the data instead of {position}")
        position = entry.end
    if position != data_bytes:
        raise _broken(path, f"its tensors take {position} bytes, its data has {data_bytes}")
    return ordered


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name[:80]!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"tensor {name[:80]!r} has dtype {str(dtype)[:20]!r}, known are {', '.join(DTYPE_BITS)}")
    if not _are_counts(shape) or len(shape) > 8 or prod(shape) > MAX_ELEMENTS:
        raise _broken(path, f"tensor {name[:80]!r} has shape {str(shape)[:80]}, which is no list of at most 8 sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name[:80]!r} has data_offsets {str(offsets)[:80]}, which are not two byte counts")
    needed = prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != needed:
        raise _broken(path, f"tensor {name[:80]!r} of {dtype} {shape} needs {needed} bytes, its offsets give {offsets[1] - offsets[0]}")
    return TensorEntry(dtype, tuple(shape), *offsets)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _broken(path: Path, why: str) -> InvalidInput:
    return InvalidInput(f"{path.name} is not a whole safetensors file: {why}", code="invalid_safetensors")
