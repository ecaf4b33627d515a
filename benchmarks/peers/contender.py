"""What every contender is, and how it is driven: one JSON request a line on standard input, one JSON answer a line on standard output.

A contender runs in an environment of its own, so this file knows nothing but the standard library. Contenders are all started before the
first is measured, and then take turns, work by work: what else happens on the machine hits all of them.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Tokens = list[int]


class Contender(Protocol):
    """One model in one format, loaded. Every method raises NotImplementedError where the library does not offer that."""

    def load(self) -> None:
        """From the file to a model that answers."""

    def prefill(self, prompts: list[Tokens]) -> None:
        """Forget everything and read the prompts, each as a sequence of its own; the next tokens follow them."""

    def decode(self, steps: int) -> float | None:
        """So many greedy tokens for each of the sequences; seconds, where they are not those of the call."""


def version(package: str) -> str:
    from importlib.metadata import version

    return f"{package} {version(package)}"


def serve(make: Callable[[str, int], Contender], describe: str) -> None:
    """Answer requests until standard input ends. `make` takes the model's path and the number of threads."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    contender = make(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"seconds": _run(contender, **request), "peak_bytes": peak_bytes(), "library": describe}
        except NotImplementedError:
            answer = {"seconds": None, "peak_bytes": peak_bytes(), "library": describe}
        print(json.dumps(answer), file=answers, flush=True)


def _run(contender: Contender, work: str, prompts: list[Tokens] | None = None, steps: int = 0) -> float:
    """Seconds of `load`, of `prefill` of the prompts, or of `decode` of so many steps after them."""
    if work == "decode":
        contender.prefill(prompts or [])
    seconds = None
    started = time.perf_counter()
    if work == "load":
        contender.load()
    elif work == "prefill":
        contender.prefill(prompts or [])
    else:
        seconds = contender.decode(steps)
    return time.perf_counter() - started if seconds is None else seconds


def peak_bytes() -> int:
    """The most that this process has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
