"""The page about a run that goes on: one file without a script, which the browser loads again every few seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jinja2

import pfedsam
from pfedsam.errors import ErrorCode
from pfedsam.files import write_atomically
from pfedsam.report.live import comparison, simulation
from pfedsam.report.live.curves import curves, swatch
from pfedsam.report.live.view import GLOBAL, PERSONAL, Training, mean
from pfedsam.storage.progress import FAILED, FINISHED, RUNNING, STOPPED, Progress, read_progress

LIVE_FILE = "live.html"
#: Seconds after which the page is written, and loaded, again.
SECONDS = 5


@dataclass(frozen=True)
class Step:
    """What to do next: a sentence, then a command line or a file beside the page, if there is one."""

    sentence: str
    command: str = ""
    link: str = ""


def write_page(run: Path, *, kept: bool = True) -> Progress:
    """Write `<run>/live.html`, mode 0600, from the records of the run as they are now.

    Args:
        run: folder of a simulation or a comparison.
        kept: whether somebody writes it again every `SECONDS`: then the browser loads it again, while the run goes on.

    Returns:
        Where the run is.

    Raises:
        PFedSAMError: E33 if the folder tells no progress.
        OSError: if the page cannot be written.
    """
    progress = read_progress(run)
    found = (comparison if progress.what == "comparison" else simulation).trainings(run, progress)
    write_atomically(run / LIVE_FILE, page(run, progress, found, time.time(), kept).encode())
    return progress


def page(run: Path, progress: Progress, trainings: list[Training], now: float, kept: bool) -> str:
    """The page as text.

    Args:
        run: folder of the run, as the person has given it.
        progress: of its command.
        trainings: the federation, or the runs of the comparison.
        now: seconds since 1970.
        kept: see `write_page`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfedsam.report", "templates"), autoescape=True, trim_blocks=True
    )
    environment.filters |= {"dice": _dice, "clock": clock, "told": lambda line: line.split(": ", 1)[-1]}
    running = progress.state == RUNNING
    return environment.get_template("live.html.j2").render(
        version=pfedsam.__version__,
        progress=progress,
        trainings=trainings,
        shown=[one for one in trainings if one.points],
        done=sum(one.state == "done" for one in trainings),
        models=(GLOBAL, PERSONAL),
        headline=_headline(trainings[0]) if progress.what == "simulation" else None,
        curves=curves,
        swatch=swatch,
        share=min(1.0, progress.done / progress.total) if progress.total else float(progress.state == FINISHED),
        passed=(progress.ended or now) - progress.begun,
        left=progress.left(now) if running else None,
        written=time.strftime("%H:%M:%S", time.localtime(now)),
        day=time.strftime("%Y-%m-%d", time.localtime(now)),
        reload=SECONDS if running and kept else None,
        steps=next_steps(run, progress),
        run=str(run),
    )


def next_steps(run: Path, progress: Progress) -> list[Step]:
    """What to do next, by the state of the run."""
    again = Step("What is done is kept. To go on:", progress.command)
    if progress.state == RUNNING:
        return [Step("If it is stopped, what is done is kept. To go on then:", progress.command)]
    if progress.state == STOPPED:
        return [again]
    if progress.state == FAILED:
        codes = {code for code in (progress.code, *progress.failed.values()) if code}
        known = [code for code in ErrorCode if code.value in codes]
        logs = f"{run}/logs" if progress.what == "comparison" else f"{run}/simulator.log"
        where = Step(f"The terminal has the whole sentence; more is in {logs}.")
        return [*(Step(f"{code}: {code.meaning}. {code.remedy}") for code in known), where, again]
    if progress.what == "comparison":
        return [
            Step("The tables with intervals and tests:", link="tables.md"),
            Step("The same in the terminal:", f"{progress.command} --table"),
        ]
    return [
        Step("The report, with pictures of the best and the worst case:", link="report.html"),
        Step("Where the models of the sites are:", f"pfedsam state list --root {run}/state"),
    ]


def _headline(training: Training) -> tuple[str, float | None]:
    """Which model the large number is of, and its mean over sites: the personal one once its final phase is done."""
    fitted = [training.at(site, PERSONAL, training.of, final=True) for site in training.sites]
    if all(value is not None for value in fitted):
        return PERSONAL, mean(fitted)
    return GLOBAL, training.mean_last(GLOBAL)


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def clock(seconds: float | None) -> str:
    """A duration for people; a question mark if it is not known."""
    if seconds is None:
        return "?"
    whole = timedelta(seconds=round(max(0.0, seconds)))
    return f"{whole.days} d {whole.seconds // 3600} h" if whole.days else str(whole)
