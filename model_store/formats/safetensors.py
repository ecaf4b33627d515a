"""Tensors in and out of safetensors files, one at a time, so that a model larger than memory passes through.

`SafetensorsSource` and `SafetensorsWriter` are the two ends that `quantizers.tensors` describes. Torch is imported when a tensor is
first touched, not with this module.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from safetensors import safe_open

from model_store.formats.safetensors_header import DTYPE_BITS, METADATA, TensorEntry, read_header
from quantizers.errors import CorruptData, InvalidInput, NotFound

if TYPE_CHECKING:
    import torch

# torch's attribute for each of the format's names
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip


COPY_BYTES = 1 << 20


class SafetensorsSource:
    """The tensors of one or more files as one mapping, read from mapped memory; a `quantizers.tensors.TensorSource`."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads and checks every header. Raises InvalidInput for a broken file or a name that two files hold."""
        self._files: dict[str, Path] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._handles: dict[Path, Any] = {}
        for path in files:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise InvalidInput(f"tensor {name!r} is in {self._files[name].name} and again in {path.name}")
                self._files[name], self._entries[name] = path, entry

    def keys(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self._entry(name).dtype])
        return dtype

    def bytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return self._entry(name).bytes

    def get(self, name: str) -> "torch.Tensor":
        """The tensor, on the CPU, of its stored shape and dtype; a view of the mapped file, not to be changed. Raises NotFound."""
        self._entry(name)
        path = self._files[name]
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        tensor: torch.Tensor = self._handles[path].get_tensor(name)
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise NotFound(
                f"no tensor {name!r} among the {len(self._entries)} of {', '.join(sorted({p.name for p in self._files.values()}))}"
            ) from None


class SafetensorsWriter:
    """A `quantizers.tensors.TensorSink` that appends tensors to `path` as they come.

    The header stands before the data and is known last, so the data goes to `<path>.data` first and is copied behind the header on
    `close`. As a context manager it closes where the block ends well and leaves no file where it does not.
    """

    def __init__(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        self._path = path
        self._data_path = path.with_name(path.name + ".data")
        self._data = self._data_path.open("wb")
        self._metadata = {"format": "pt", **(metadata or {})}
        self._entries: dict[str, TensorEntry] = {}
        self._position = 0

    def __call__(self, name: str, tensor: "torch.Tensor") -> None:
        """Append one tensor, of any device and stride. Raises InvalidInput for a name that was written or a dtype that the format lacks."""
        import torch

        dtypes = {getattr(torch, torch_name): word for word, torch_name in TORCH_NAMES.items()}
        if name in self._entries or name == METADATA:
            raise InvalidInput(f"tensor {name!r} is taken: every tensor has a name of its own")
        if tensor.dtype not in dtypes:
            raise InvalidInput(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        size = flat.numel() * flat.element_size()
        if size:
            self._data.write(flat.view(torch.uint8).numpy().data)
        self._entries[name] = TensorEntry(dtypes[tensor.dtype], tuple(tensor.shape), self._position, self._position + size)
        self._position += size

    def close(self) -> None:
        """Write the file: header, then data. Raises OSError for a full disk, leaving nothing."""
        self._data.close()
        # The widest elements first, as the library does: a reader maps tensors in place, which needs aligned offsets.
        order = sorted(self._entries.items(), key=lambda item: -DTYPE_BITS[item[1].dtype])
        try:
            with self._path.open("wb") as target, self._data_path.open("rb") as data:
                target.write(_header([(name, entry) for name, entry in order], self._metadata))
                for _, entry in order:
                    data.seek(entry.begin)
                    _copy(data, target, entry.bytes)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            self._data_path.unlink()

    def abandon(self) -> None:
        """Drop what was written."""
        self._data.close()
        self._data_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _header(entries: Sequence[tuple[str, TensorEntry]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {METADATA: metadata}
    position = 0
    for name, entry in entries:
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, position + entry.bytes]}
        position += entry.bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns the data to 8 bytes
    return len(raw).to_bytes(8, "little") + raw


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, COPY_BYTES))
        if not chunk:
            raise CorruptData(f"{count} bytes of tensors are missing: something shortened a file that was being written")
        target.write(chunk)
        count -= len(chunk)
