"""`pfedsam watch`: the page about a run that another terminal has started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import console
from pfedsam.commands.interrupts import ends_in_order
from pfedsam.commands.listing import LOOK
from pfedsam.commands.live import say_where
from pfedsam.storage.progress import FINISHED, RUNNING, Progress

app = typer.Typer()


@app.command(rich_help_panel=LOOK)
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder of `pfedsam simulate`, `demo` or `compare`.")],
    once: Annotated[bool, typer.Option("--once", help="Write the page once, without reloading, and stop.")] = False,
) -> None:
    """Follow a run of another terminal in a page: rounds, sites, Dice, time left. The run itself stays as it is.

    The page is <run>/live.html, one file without a script or a link to outside. It is written every few seconds, and
    the browser loads it again, until the run has ended; Ctrl-C ends the watching, not the run. Exit code 1 if the run
    failed or was stopped.
    """
    from pfedsam.report.live.page import SECONDS, write_page

    progress = write_page(run, kept=not once)
    say_where(run)
    if not once and progress.state == RUNNING:
        with ends_in_order("The run goes on."), console.status(_line(progress)) as status:
            try:
                while progress.state == RUNNING:
                    time.sleep(SECONDS)
                    progress = write_page(run)
                    status.update(_line(progress))
            except KeyboardInterrupt:
                write_page(run, kept=False)
                raise
    console.print(_line(progress), highlight=False, soft_wrap=True)
    if progress.state not in (RUNNING, FINISHED):
        raise typer.Exit(1)


def _line(progress: Progress) -> str:
    from pfedsam.report.live.page import clock

    where = f"{progress.name}: {progress.state}, {progress.done} of {progress.total} events"
    if progress.state != RUNNING:
        return f"{where}{f', {progress.code}' if progress.code else ''}"
    return f"{where}, left: {clock(progress.left(time.time()))}; {progress.line}"
