"""`precis doctor`: what hardware is here, which kernel runs each number format on it, and why not a faster one."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from server.quantizing import resolve_device
from server.settings import Settings

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
_PACKAGES = ("torch", "transformers", "bitsandbytes", "fastapi", "safetensors")
_FORMATS = (
    "fp32",
    "bf16",
    "rtn-w8",
    "rtn-w8a8",
    "rtn-w4g64",
    "rtn-w4g64z",
    "rtn-w4g32m",
    "rtn-w3g64",
    "rtn-w2g64",
    "rtn-w4g64a8",
    "rtn-fp8",
    "rtn-mxfp4",
    "rtn-nvfp4",
    "bnb-int8",
    "bnb-nf4",
    "bnb-fp4",
)


def doctor(settings: Settings, *, as_json: bool) -> None:
    """Print the findings as a table or as JSON."""
    facts: dict[str, dict[str, str | list[str]]] = {
        "hardware": _hardware(settings),
        "packages": {name: version(name) for name in _PACKAGES},
        "kernels": _kernels(settings.device),
    }
    if as_json:
        print(json.dumps({**facts, "data_dir": str(settings.data_dir)}, indent=2))
        return
    console = Console()
    for title, found in facts.items():
        table = Table("what", "found", title=title, title_justify="left")
        for name, value in found.items():
            table.add_row(name, value if isinstance(value, str) else ", ".join(value))
        console.print(table)
    console.print(f"data directory: {settings.data_dir}")


def _hardware(settings: Settings) -> dict[str, str | list[str]]:
    import torch

    from server.engine.device import default_budget, gpus

    memory = psutil.virtual_memory()
    device = torch.device(resolve_device(settings.device))
    budget, origin = settings.memory_budget_bytes, "as the settings say"
    if budget is None:
        budget, origin = default_budget(device), "80 % of what is free now"
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used by torch",
        "instructions": [feature for feature in _CPU_FEATURES if feature in _cpu_flags()] or ["none of note"],
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "gpu": [str(gpu) for gpu in gpus()] or [f"none that torch {torch.__version__} sees; everything runs on the CPU"],
        "budget": f"variants may hold {budget / 2**30:.1f} GiB on {device}, {origin}",
    }


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def _kernels(device: str) -> dict[str, str | list[str]]:
    """Kernel that runs each format on a layer of 4096 x 4096."""
    import torch

    from quantizers.kernels import LayerKind, cuda, select
    from quantizers.kernels.cpu import library
    from quantizers.recipe import parse_recipe
    from quantizers.scheme import FloatScheme, MixedScheme
    from quantizers.skeleton import DTYPES

    target = torch.device(resolve_device(device))
    why = library.missing()
    found: dict[str, str | list[str]] = {"native library": f"uses {library.instruction_set()}" if why is None else f"missing: {why}"}
    why = cuda.why_not(target)
    found["triton kernels"] = f"run on {target}" if why is None else f"do not run: {why}"
    for slug in _FORMATS:
        recipe = parse_recipe(slug)
        if isinstance(recipe.scheme, FloatScheme):
            found[slug] = "torch"
        else:
            assert not isinstance(recipe.scheme, MixedScheme), "its formats are listed one by one"
            found[slug] = select(LayerKind(recipe.scheme, 4096, 4096, DTYPES[recipe.dtype], target)).name
    return found
