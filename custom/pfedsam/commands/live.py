"""Keeps what a long command tells of itself in its run folder, and with `--live` the page that follows it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import console
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.progress import FAILED, FINISHED, STOPPED, Progress, read_progress, write_progress

Live = Annotated[
    bool, typer.Option("--live", help="Write a page that follows the run, <out>/live.html: rounds, Dice, time left.")
]


class Following:
    """Writes where a command is: call it with the number of events that were told, and the last of them."""

    def __init__(self, run: Path, progress: Progress, ours: bool) -> None:
        self.progress = progress
        self._run, self._ours = run, ours

    def __call__(self, done: int, line: str) -> None:
        """Write it."""
        self.progress.event(done, line)
        self.write()

    def write(self) -> None:
        """Write what has changed. A run does not end because the disk has no room for this."""
        if self._ours:
            with suppress(OSError):
                write_progress(self._run, self.progress)


@contextmanager
def following(run: Path, progress: Progress, live: bool) -> Iterator[Following]:
    """Keep `progress.json` in a run folder while the block runs, and the page with `live`.

    Where another process has begun in the same folder and still runs, its file and its page stay.

    Args:
        run: the folder; it must exist.
        progress: of this command.
        live: write the page every few seconds, until the run has ended.
    """
    following = Following(run, progress, ours=not _another_runs(run, progress.pid))
    following.write()
    page = _Page(run) if live else None
    try:
        if page:
            page.begin()
        yield following
        progress.end(FAILED if progress.failed else FINISHED)
    except PFedSAMError as error:
        progress.end(FAILED, error.code.value)
        raise
    except Exception:
        progress.end(FAILED, ErrorCode.UNEXPECTED.value)
        raise
    except BaseException:
        progress.end(STOPPED)
        raise
    finally:
        following.write()
        if page:
            page.end()


def say_where(run: Path) -> None:
    """Print the address of the page."""
    from pfedsam.report.live.page import LIVE_FILE

    console.print(f"open in a browser: {(run / LIVE_FILE).resolve().as_uri()}", highlight=False, soft_wrap=True)


class _Page(threading.Thread):
    """Writes the page again and again, and a last time when the run has ended."""

    def __init__(self, run: Path) -> None:
        super().__init__(name="live page", daemon=True)
        self._run, self._ended = run, threading.Event()

    def begin(self) -> None:
        """Write it, say where it is, and go on writing it."""
        from pfedsam.report.live.page import write_page

        write_page(self._run)
        say_where(self._run)
        self.start()

    def run(self) -> None:
        """What the thread does."""
        from pfedsam.report.live.page import SECONDS, write_page

        while not self._ended.wait(SECONDS):
            with suppress(OSError, PFedSAMError):  # the run goes on without its page
                write_page(self._run)

    def end(self) -> None:
        """Write it a last time."""
        from pfedsam.report.live.page import write_page

        self._ended.set()
        if self.is_alive():
            self.join()
        with suppress(OSError, PFedSAMError):
            write_page(self._run)


def _another_runs(run: Path, pid: int) -> bool:
    try:
        there = read_progress(run)
    except PFedSAMError:
        return False
    return there.runs_now and there.pid != pid
