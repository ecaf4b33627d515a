"""The NEON kernels under an emulator, against the scalar ones there and against this machine's: bit for bit, by native_bits.cpp.

No machine that runs this suite has an ARM processor. What an emulator cannot show is speed, and what threads see of each other's writes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantizers.kernels.cpu import library

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "quantizers/kernels/cpu/native"
HARNESS = Path(__file__).with_name("native_bits.cpp")
COMPILER = shutil.which("aarch64-linux-gnu-g++-12") or shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
HOST_COMPILER = shutil.which("g++") or shutil.which("c++")
# Neoverse N1 is ARMv8.2 with dot products and little else; Cortex-A53 is ARMv8.0.
WITH_DOT_PRODUCTS, WITHOUT = "neoverse-n1", "cortex-a53"
WARNINGS = "-Wall -Wextra -Werror"
FORMATS = ("grouped", "int8 tokens", "w8a8", "nf4", "mxfp4", "nvfp4", "e4m3", "bf16", "fp32", "step")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMPILER is None or EMULATOR is None,
        reason="needs a cross compiler and an emulator: apt-get install g++-12-aarch64-linux-gnu qemu-user-static",
    ),
]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compile_harness(compiler: str, to: Path, *linked: str | Path) -> Path:
    run(compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-pthread", "-I", NATIVE, HARNESS, *linked, "-o", to)
    return to


def emulated(program: Path, processor: str, *arguments: str) -> str:
    assert EMULATOR is not None
    return run(EMULATOR, "-cpu", processor, program, *arguments)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness for ARM, over the extension as setup.py compiles it; a warning is an error."""
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("arm")
    tools = {"CC": COMPILER, "CXX": COMPILER, "LDSHARED": f"{COMPILER} -shared", "LDCXXSHARED": f"{COMPILER} -shared"}
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-temp", folder, "--build-lib", folder)
    run(*command, **tools, CFLAGS=WARNINGS, CXXFLAGS=WARNINGS)  # which of them is read depends on setuptools
    objects = sorted(folder.rglob("*.o"))
    assert len(objects) == len(list(NATIVE.glob("*.cpp")))
    return compile_harness(COMPILER, folder / "native_bits", *objects, "-static")


@pytest.fixture(scope="module")
def results(program: Path) -> str:
    """Digests of the scalar kernels' results, where those of NEON are the same."""
    return emulated(program, WITH_DOT_PRODUCTS, "scalar", "neon")


def test_a_processor_without_dot_products_gets_the_scalar_kernels(program: Path) -> None:
    assert emulated(program, WITH_DOT_PRODUCTS) == "neon\n"
    assert emulated(program, WITHOUT) == "scalar\n"


def test_neon_is_scalar_to_the_bit(results: str) -> None:
    names = results.splitlines()
    assert all(any(name.startswith(form) for name in names) for form in FORMATS)


@pytest.mark.skipif(
    library.missing() is not None or HOST_COMPILER is None, reason="needs the native kernels and a compiler of this machine"
)
def test_arm_is_this_machine_to_the_bit(results: str, tmp_path: Path) -> None:
    assert HOST_COMPILER is not None
    here = compile_harness(HOST_COMPILER, tmp_path / "native_bits", library.library()._name)
    assert run(here, "scalar") == results
