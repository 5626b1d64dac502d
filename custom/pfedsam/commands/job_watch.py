"""`pfedsam job watch`: a job of the federation as its administrator sees it, live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pfedsam.commands.console import Admin, console
from pfedsam.commands.interrupts import ends_in_order

#: Seconds between two looks.
SECONDS = 5.0


def watch_job(
    job: Annotated[str, typer.Argument(help="Id of the job (`list_jobs` in NVFlare's console).")],
    admin: Admin,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop.")] = False,
) -> None:
    """Follow a job: rounds, time left, and of each site whether it took part, norm, Dice, refusals.

    The server is asked, no site is. Whoever may not download the job sees rounds and sites' connections only. Time left
    is that of the rounds; the final personal phase and the evaluation come on top. Ctrl-C ends the watching, not the
    job. Exit code 1 if the job has not ended as it should.
    """
    with console.status("connecting"):
        from pfedsam.deployment.admin import connect
        from pfedsam.deployment.job_view import Viewer

    with connect(admin) as session, ends_in_order("The job goes on."):
        viewer = Viewer(session, job)
        view = viewer.look()
        if once or view.ended:
            _show(view)
        else:
            view = follow(viewer, view)
    if view.ended and not view.completed:
        raise typer.Exit(1)


def follow(viewer: Any, view: Any) -> Any:
    """Show a job until it has ended: in a terminal a table that changes, in a log a line where something is new.

    Args:
        viewer: a `pfedsam.deployment.job_view.Viewer`.
        view: its first look.

    Returns:
        The last look.
    """
    return _live(viewer, view) if console.is_terminal else _lines(viewer, view)


def headline(view: Any) -> str:
    """One line: status, round, part of the job, time left."""
    where = f"{view.job_id} {view.name}: {view.status}"
    done = 0 if view.seen.closed is None else view.seen.closed + 1
    if view.seen.current is not None:
        where += f", {done}{f' of {view.end}' if view.end else ''} rounds done"
    if view.workflow and not view.ended:
        where += f", {view.workflow}"
    if not view.ended and view.end is not None and done < view.end:
        where += f", left: {_clock(view.left())}"
    return where


def site_line(name: str, site: Any) -> str:
    """A site in a few words, for a log."""
    words = [f"norm {site.norm:.3g}"] if site.norm is not None else []
    words += [f"Dice {site.dice:.2f}"] if site.dice is not None else []
    words += [site.problem] if site.problem else []
    return f"{name} ({', '.join(words)})" if words else name


def site_table(view: Any) -> Table:
    """A row for each site; a dash where the server says nothing."""
    table = Table("site", "connected", "took part", "last round", "cases", "norm", "share", "Dice (global)", "notes")
    for name, site in view.seen.sites.items():
        connected = "-" if view.connected is None else ("yes" if name in view.connected else "no")
        count = f"{site.rounds} of {site.rounds + len(site.missing)}" if site.rounds or site.missing else "-"
        last = "-" if site.last is None else str(site.last)  # as in the logs, from 0
        numbers = (_cell(site.cases, "g"), _cell(site.norm, ".3g"), _cell(site.share, ".2f"), _cell(site.dice, ".2f"))
        table.add_row(name, connected, count, last, *numbers, "; ".join(_notes(site)))
    return table


def _notes(site: Any) -> Iterator[str]:
    from pfedsam.deployment.job_log import refusal

    if site.problem:
        yield f"refused: {site.problem}, {refusal(site.problem)}"
    if site.missing:
        yield f"missing in round {', '.join(map(str, site.missing[-3:]))}"
    if site.final:
        yield f"final phase: {site.final}"


def _whole(view: Any) -> Group:
    hidden = [Text(f"not shown to this administrator: {what}", style="yellow") for what in view.hidden]
    return Group(Text(headline(view)), site_table(view), *hidden)


def _show(view: Any) -> None:
    console.print(_whole(view))


def _live(viewer: Any, view: Any) -> Any:
    with Live(_whole(view), console=console, auto_refresh=False) as shown:
        while not view.ended:
            time.sleep(SECONDS)
            view = viewer.look()
            shown.update(_whole(view), refresh=True)
    return view


def _lines(viewer: Any, view: Any) -> Any:
    """In a log: the whole at the beginning and the end, and a line for each round that is over and each new status."""
    _show(view)
    told = (view.status, view.seen.closed, view.workflow)
    while not view.ended:
        time.sleep(SECONDS)
        view = viewer.look()
        if told != (now := (view.status, view.seen.closed, view.workflow)):
            told = now
            sites = "; ".join(site_line(name, site) for name, site in view.seen.sites.items())
            console.print(f"{headline(view)}; {sites}", highlight=False, soft_wrap=True)
    _show(view)
    return view


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _clock(seconds: float | None) -> str:
    from pfedsam.report.live.page import clock

    return clock(seconds)
