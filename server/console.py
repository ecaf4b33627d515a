"""Progress on the terminal: a bar with time left where standard error is one, a line per stage where it is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Share(Protocol):
    """How far something is: its stage, the share done from 0 to 1, and what changes so fast that only a bar shows it."""

    def __call__(self, stage: str, share: float, detail: str = "") -> None: ...


_WIDE = 220  # characters: into a file or a pipe a table is written whole


def output() -> Console:
    """Standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


@contextmanager
def bar(title: str) -> Iterator[Share]:
    """A bar on standard error for the time of the block; what is yielded moves it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)

        def show(stage: str, share: float, detail: str = "") -> None:
            progress.update(task, description=f"{title}: {stage}{detail}", completed=share)

        yield show


class _Lines:
    """The same without a terminal: every stage once, so that a log stays readable."""

    def __init__(self, title: str, console: Console) -> None:
        self._title, self._console, self._stage = title, console, ""

    def __call__(self, stage: str, share: float, detail: str = "") -> None:  # noqa: ARG002 - a line a stage
        if stage != self._stage:
            self._stage = stage
            self._console.print(f"{self._title}: {stage}", highlight=False)
