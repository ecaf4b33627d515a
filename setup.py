"""The C++ kernels as an optional extension; everything else about the package is in pyproject.toml.

Where there is no compiler the package installs without them and the torch kernels serve (`precis doctor` says so). No -march: one binary
runs on every processor of an architecture, and picks its instruction set when it is loaded.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("quantizers/kernels/cpu/native")


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, as many as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            for name in self.compiler.object_filenames(sources, output_dir=options["output_dir"]):
                Path(name).parent.mkdir(parents=True, exist_ok=True)  # or two files would make their folder at the same time
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [name for names in pool.map(lambda source: compile_all([source], **options), sources) for name in names]

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "quantizers.kernels.cpu._native",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for pattern in ("*.h", "*.inc") for path in sorted(NATIVE.glob(pattern))],
            language="c++",
            # Contraction would fuse what the scalar kernels, the specification of the others, do in two roundings.
            # The warnings that are off are false ones, about gcc's own intrinsics.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
