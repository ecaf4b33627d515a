"""The header of a GGUF file, walked as a hostile one before any other reader sees it.

The usual readers believe the counts that a file states, and loop or allocate by them. This walk reads only lengths, checks each against
the bytes that are there, and keeps the few values that others decide by. Layout (version 2 and 3, little endian):

    "GGUF" u32 version  u64 tensors  u64 pairs
    pairs    string key, u32 type, value          string = u64 length, bytes; array = u32 type, u64 count, values
    tensors  string name, u32 dimensions, u64 sizes..., u32 type, u64 offset
    padding to general.alignment, then the data
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quantizers.errors import InvalidInput

MAGIC = int.from_bytes(b"GGUF", "little")
MAX_PAIRS = 1 << 14  # real files have tens; the reader after us takes memory for each
MAX_TENSORS = 1 << 16
MAX_ARRAY_ITEMS = 1 << 22  # over all arrays: a vocabulary of 256,000 with scores, types and merges has a million
MAX_NAME = 1 << 10
MAX_DIMENSIONS = 4
ALIGNMENT = 32

_UINT32, _STRING, _ARRAY = 4, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> struct's letter


@dataclass(frozen=True)
class GgufHeader:
    """`scalars` holds the single values and short strings of the metadata, `tensors` the number of elements of each tensor by name."""

    scalars: dict[str, int | float | bool | str]
    tensors: dict[str, int]

    @property
    def architecture(self) -> str:
        return str(self.scalars["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises InvalidInput, naming the file and the place, for anything that is no whole GGUF file of version 2 or 3."""
    with _mapped(path) as data:
        walk = _Walk(data, path)
        magic, version, tensor_count, pair_count = walk.unpack("IIQQ")
        if magic != MAGIC:
            raise walk.broken("it does not begin with the letters GGUF")
        if version not in (2, 3):
            raise walk.broken(f"version {version} (or another byte order); 2 and 3 are read")
        if not 0 < tensor_count <= MAX_TENSORS or pair_count > MAX_PAIRS:
            raise walk.broken(f"{tensor_count} tensors and {pair_count} pairs; allowed are 1 to {MAX_TENSORS} and at most {MAX_PAIRS}")
        scalars = walk.pairs(pair_count)
        header = GgufHeader(scalars, walk.tensors(tensor_count, scalars.get("general.alignment", ALIGNMENT)))
    _check_shape_of_model(header, path)
    return header


def _check_shape_of_model(header: GgufHeader, path: Path) -> None:
    """A stated number of layers that the tensors contradict would build a model of that many layers."""
    if not isinstance(header.scalars.get("general.architecture"), str):
        raise InvalidInput(f"{path.name} names no general.architecture, so there is no telling which model it is", code="invalid_gguf")
    stated = header.scalars.get(f"{header.architecture}.block_count")
    present = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if type(stated) is not int or stated != len(present):
        raise InvalidInput(f"{path.name} states {stated} blocks and holds tensors of {len(present)}: it is not whole", code="invalid_gguf")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    if path.stat().st_size < 24:
        raise InvalidInput(f"{path.name} has {path.stat().st_size} bytes, which is too short for a GGUF file", code="invalid_gguf")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


class _Walk:
    """A position in the file, moved by reads that never pass its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._size = data, path, len(data)
        self._position = 0
        self._items_left = MAX_ARRAY_ITEMS

    def broken(self, why: str) -> InvalidInput:
        return InvalidInput(f"{self._path.name} is not a whole GGUF file: {why} (at byte {self._position})", code="invalid_gguf")

    def unpack(self, letters: str) -> tuple[int, ...]:
        layout = struct.Struct("<" + letters)
        begin = self._skip(layout.size)
        return layout.unpack_from(self._data, begin)

    def pairs(self, count: int) -> dict[str, int | float | bool | str]:
        scalars: dict[str, int | float | bool | str] = {}
        seen: set[str] = set()
        for _ in range(count):
            key = self._string(MAX_NAME)
            if key in seen:
                raise self.broken(f"the key {key[:80]!r} occurs twice")
            seen.add(key)
            (kind,) = self.unpack("I")
            if kind == _STRING:
                scalars[key] = self._string(self._size)
            elif kind == _ARRAY:
                self._skip_array()
            else:
                (scalars[key],) = self.unpack(self._scalar(kind))
        return scalars

    def tensors(self, count: int, alignment: int | float | bool | str) -> dict[str, int]:
        from gguf.constants import GGML_QUANT_SIZES

        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.broken(f"general.alignment is {alignment!r}, not a power of two up to 1048576")
        tensors: dict[str, int] = {}
        ends = []
        for _ in range(count):
            name = self._string(MAX_NAME)
            (dimensions,) = self.unpack("I")
            if name in tensors or not 0 < dimensions <= MAX_DIMENSIONS:
                raise self.broken(f"tensor {name[:80]!r} occurs twice or has {dimensions} dimensions (1 to {MAX_DIMENSIONS} are allowed)")
            shape = self.unpack(f"{dimensions}Q")
            kind, offset = self.unpack("IQ")
            if kind not in GGML_QUANT_SIZES:
                raise self.broken(f"tensor {name[:80]!r} has the unknown type {kind}")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[0] % block or offset % alignment:
                raise self.broken(
                    f"tensor {name[:80]!r} has shape {shape} at offset {offset}: rows take blocks of {block}, offsets steps of {alignment}"
                )
            tensors[name] = prod(shape)
            ends.append((offset + tensors[name] // block * block_bytes, name))
        begin = -(-self._position // alignment) * alignment
        last, name = max(ends)
        if begin + last > self._size:
            raise self.broken(f"tensor {name[:80]!r} ends at byte {begin + last}, the file at {self._size}")
        return tensors

    def _skip(self, count: int) -> int:
        begin = self._position
        if count > self._size - begin:
            raise self.broken(f"{count} bytes are announced where {self._size - begin} are left")
        self._position = begin + count
        return begin

    def _string(self, longest: int) -> str:
        (length,) = self.unpack("Q")
        if length > longest:
            raise self.broken(f"a name of {length} bytes, allowed are {longest}")
        begin = self._skip(length)
        try:
            return self._data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise self.broken("a string is not UTF-8") from error

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.broken(f"unknown type {kind} of a value")
        return _SCALARS[kind]

    def _skip_array(self) -> None:
        kind, count = self.unpack("IQ")
        self._items_left -= count
        if self._items_left < 0:
            raise self.broken(f"an array of {count} items, allowed are {MAX_ARRAY_ITEMS} in all")
        if kind == _STRING:
            for _ in range(count):
                self._string(self._size)
        elif kind == _ARRAY:
            raise self.broken("an array of arrays, which no model uses")
        else:
            self._skip(count * struct.calcsize("<" + self._scalar(kind)))
