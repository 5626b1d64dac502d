"""What the commands share: the console, progress bars, common options."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.progress import Pace
from pfedsam.storage.run_folder import claim_run

#: Paths and names may hold brackets: a text is printed as it is, unless a call asks for markup.
console = Console(markup=False)

#: In a log; a terminal has a bar that moves.
SECONDS_BETWEEN_LINES = 60.0

RunFolder = Annotated[Path, typer.Option("--out", help="Run folder; a run that was stopped goes on in it.")]
Bundle = Annotated[str, typer.Option(help="Name of an installed bundle.")]
ModelBundle = Annotated[str | None, typer.Option("--bundle", help="Installed bundle; by default what the model names.")]
Job = Annotated[str, typer.Option(help="Name of a packaged job, or a job folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override of the bundle, as key=value; may be repeated (see `pfedsam settings`)."),
]
Admin = Annotated[Path, typer.Option(help="Startup kit of an administrator.")]
Force = Annotated[bool, typer.Option("--force", help="Replace or write into what is there already, whosever it is.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin anew: what an earlier run has left in the folder is moved aside.")
]
StateRoot = Annotated[Path | None, typer.Option(help="State root; by default as in training.")]


def literals(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts as JSON literals, else as strings, checked before anything is started.

    Raises:
        PFedSAMError: E18 for a text without `=`, an unknown key or a value outside its range.
    """
    from pfedsam.settings import checked

    literals: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PFedSAMError(
                ErrorCode.OVERRIDE_NOT_ALLOWED,
                f"override {shlex.quote(pair)} is not key=value.",
                "For example: batch_size=4",
            )
        try:
            literals[key] = json.loads(value)
        except (ValueError, RecursionError):
            literals[key] = value
    return checked(literals)


def claim_folder(folder: Path, what: str, laid_out: Callable[[Path], bool], force: bool) -> None:
    """Mark a folder as ours before a command writes into it; see `pfedsam.storage.run_folder.claim_run`."""
    if claim_run(folder, what, laid_out, force):
        console.print(f"{folder} was made by an earlier version; it is marked as ours now", soft_wrap=True)


def show_doubts(folders: Iterable[Path]) -> None:
    """Name the sites whose updates did not count as they came, by the server's records; see `federated.rounds`."""
    from pfedsam.federated.rounds import remarks

    for line in remarks(folders):
        console.print(line, style="yellow", highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Leave out what MONAI says at each start about optional parts, and its own bars beside ours; errors stay."""
    import logging
    import warnings

    os.environ.setdefault("TQDM_DISABLE", "1")  # which tqdm reads when it is imported
    warnings.filterwarnings("ignore", message=".*NvImgCodec.*")
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*")
    for name in ("monai.bundle.workflows", "monai.data.nvimgcodec_pydicom_plugin"):
        # a filter, not a level: MONAI sets the level when it is imported
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


class Advance:
    """Moves a progress bar: `advance(done, text)`, or `advance.total(done, total)`.

    Where the output is no terminal, as in a log, it writes a line instead, a minute or more after the last one.
    """

    def __init__(self, progress: Progress, task: TaskID, pace: Pace) -> None:
        self._progress, self._task, self._pace = progress, task, pace
        self._told = time.monotonic()

    def __call__(self, done: int, text: str | None = None) -> None:
        """Set what is done, and a text."""
        described: Any = {} if text is None else {"description": text}
        self._pace.step(done, time.time())
        self._progress.update(self._task, completed=done, **described)
        self._log()

    def total(self, done: int, total: int) -> None:
        """Set both numbers."""
        self._pace.step(done, time.time())
        self._progress.update(self._task, completed=done, total=total)
        self._log()

    def _log(self) -> None:
        if console.is_terminal or time.monotonic() - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = time.monotonic()
        task = self._progress.tasks[self._task]
        passed, left = (
            "?" if seconds is None else timedelta(seconds=int(seconds))
            for seconds in (task.elapsed, self._pace.left(task.total or 0, time.time()))
        )
        line = f"{task.description}: {task.completed:g} of {task.total:g}, passed: {passed}, left: {left}"
        console.print(line, highlight=False, soft_wrap=True)


class _TimeLeft(ProgressColumn):
    """The time left by the pace of the whole run: rich's own column forgets steps, and has nothing for slow ones."""

    max_refresh = 0.5

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        super().__init__()

    def render(self, task: Task) -> Text:
        """As `h:mm:ss`."""
        left = self._pace.left(task.total or 0, time.time())
        return Text("-:--:--" if left is None else str(timedelta(seconds=int(left))), style="progress.remaining")


@contextmanager
def bar(text: str, total: int) -> Iterator[Advance]:
    """A progress bar with the time that has passed and an estimate of the time left."""
    pace = Pace()
    columns = (
        SpinnerColumn(),
        # where the terminal is narrow, the text is cut and not the time left
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"), markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        _TimeLeft(pace),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield Advance(progress, progress.add_task(text, total=total), pace)
