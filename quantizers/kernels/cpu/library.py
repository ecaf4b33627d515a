"""The shared library of `native/`, through ctypes: found, checked and described here, and nowhere else.

The library is built when the package is installed and is optional: where there is none, `missing()` says why, and the kernels that need
it support nothing. ctypes releases the interpreter's lock during a call.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantizers.errors import InvalidInput

ABI_VERSION = 6
GROUPED, TOKEN, BF16, FP32, GROUPED_TOKEN, CODEBOOK, CODEBOOK_POWER, CODEBOOK_HALVES, E4M3 = range(9)  # Kind of layout.h
ZEROS = {"none": 0, "integer": 1, "minimum": 2}
HEADER_BYTES = 64  # of a matrix of a code book
INPUTS = 32  # in_features are a multiple of it
# Beyond it a sum of products of bytes would not fit 32 bits.
MAX_IN_FEATURES = 1 << 16
_ALIGNMENT = 64


class Matrix(Structure):
    """`Matrix` of layout.h. `data` and `bias` (fp32) are addresses of memory that the owner keeps."""

    _fields_ = (
        ("kind", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("zero", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


class Source(Structure):
    """`Source` of api.h: the tensors of a `QuantizedWeight`."""

    _fields_ = (
        ("codes", c_void_p),
        ("row_bytes", c_int64),
        ("flip", c_int64),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("minimum", c_void_p),
        ("header", c_void_p),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "precis_isa": (c_char_p, []),
    "precis_select_isa": (c_int, [c_char_p]),
    "precis_advise_huge": (None, [c_void_p, c_int64]),
    "precis_collapse_huge": (None, [c_void_p, c_int64]),
    "precis_packed_bytes": (c_int64, [POINTER(Matrix)]),
    "precis_read": (c_uint64, [c_void_p, c_int64, c_int]),
    "precis_pack": (c_int, [POINTER(Source), POINTER(Matrix), c_void_p, c_int]),
    "precis_step_new": (c_void_p, [c_void_p]),
    "precis_step_free": (None, [c_void_p]),
    "precis_step_workspace_bytes": (c_int64, [c_void_p]),
    "precis_step_forward": (c_int, [c_void_p, c_void_p, c_int]),
    "precis_step_decode": (c_int, [c_void_p, c_void_p, c_void_p, c_int]),
    "precis_step_seconds": (None, [c_void_p, c_void_p]),
    "precis_choose": (c_int, [c_void_p, c_int, c_void_p, c_int]),
    "precis_log_probabilities": (c_int, [c_void_p, c_int, c_int, c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int]),
    "precis_copy_block": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int64]),
    "precis_linear": (c_int, [POINTER(Matrix), c_void_p, c_int, c_void_p, c_int]),
}


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    folder = Path(__file__).parent
    files = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return "not built: install a C++17 compiler (g++ 12 or later), then `pip install --no-deps -e .` again"
    try:
        library = ctypes.CDLL(str(file))
        version = library.precis_abi_version()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{file.name} cannot be used ({error}): run `pip install --no-deps -e .` again"
    if version != ABI_VERSION:
        return f"{file.name} has interface {version}, this code {ABI_VERSION}: run `pip install --no-deps -e .` again"
    return library


def missing() -> str | None:
    """Why the native kernels cannot run here; None where they can."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The loaded library. Raises InvalidInput where there is none: whoever calls has asked `missing` before."""
    found = _load()
    if isinstance(found, str):
        raise InvalidInput(f"the native kernels are {found}")
    return found


def instruction_set() -> str:
    """`amx` (bytes and bf16, with all of the next), `avx512` (VNNI and BF16), `avx2`, `neon` (dot products of ARMv8.2) or `scalar`."""
    name: bytes = library().precis_isa()
    return name.decode()


def select_instruction_set(name: str) -> None:
    """Run the kernels of another instruction set from now on; only `amx` changes bits, those of products with bf16 matrices.

    Raises InvalidInput where it cannot run.
    """
    if not library().precis_select_isa(name.encode()):
        raise InvalidInput(
            f"the instruction set {name!r} is not amx, avx512, avx2, neon or scalar, or this processor lacks it: it has {instruction_set()}"
        )


def call(function: Callable[..., int], *arguments: object) -> None:
    """Call a function that returns a code. Raises MemoryError."""
    code = function(*arguments)
    if code:
        raise MemoryError(f"{getattr(function, '__name__', 'a native kernel')} could not allocate its workspace")


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()


def aligned_bytes(count: int) -> Tensor:
    """uint8 [count], not initialised, on a cache line and in huge pages where the system gives them."""
    memory = torch.empty(count + _ALIGNMENT, dtype=torch.uint8)
    skip = -memory.data_ptr() % _ALIGNMENT
    return memory[skip : skip + count]


def packed_bytes(matrix: Matrix) -> int:
    """Bytes of a quantized matrix in the kernels' layout: blocks of 16 rows, codes and scales in one stream; e4m3: rows, then scales."""
    if matrix.kind == E4M3:
        return int(-(-matrix.rows * matrix.columns // _ALIGNMENT) * _ALIGNMENT + 4 * matrix.rows)
    groups = matrix.columns // matrix.group
    scales = 16 if matrix.kind == CODEBOOK_POWER else 32
    zero = {0: 0, 1: 16, 2: 32}[matrix.zero]
    header = HEADER_BYTES if matrix.kind in (CODEBOOK, CODEBOOK_POWER, CODEBOOK_HALVES) else 0
    return header + int(-(-matrix.rows // 16) * groups * (16 * matrix.group * matrix.bits // 8 + scales + zero))


def run_linear(matrix: Matrix, x: Tensor) -> Tensor:
    """`x` fp32 [tokens, columns], contiguous -> fp32 [tokens, rows], bias included. Raises MemoryError."""
    assert x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] == matrix.columns
    y = torch.empty(x.shape[0], matrix.rows)
    call(library().precis_linear, matrix, x.data_ptr(), x.shape[0], y.data_ptr(), threads())
    return y
