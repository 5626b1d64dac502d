"""A simulated federation while it runs: its sites' logs, TensorBoard's files of earlier starts, its results."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from pfedsam.report.live.view import GLOBAL, PERSONAL, Point, Test, Training, newest
from pfedsam.storage.progress import Progress
from pfedsam.storage.run_folder import EARLIER, WORKSPACE

#: Lines of a site's log, as `pfedsam.federated.learner` writes them.
_DICE = re.compile(r"- INFO - round (\d+): (global|personal) Dice (\d\.\d+)")
_FINAL = re.compile(r"- INFO - final personal phase: global Dice (\d\.\d+), personal Dice (\d\.\d+)")
#: A line of the server's log.
_ROUND = re.compile(r"- INFO - Round (\d+) finished")


def trainings(run: Path, progress: Progress) -> list[Training]:
    """The one training of a simulation.

    Args:
        run: its folder.
        progress: of its command.
    """
    points = list(_of_earlier(run, tuple(sorted(path.name for path in (run / EARLIER).glob("*")))))
    for site in progress.sites:
        points += _of_log(run / WORKSPACE / site / "log.txt", site, progress.rounds)
    state = {"finished": "done"}.get(progress.state, progress.state)
    rounds = max([_rounds(run / "simulator.log"), *(p.rounds for p in points if p.model == GLOBAL)], default=0)
    test = _test(run / "results.json") if progress.state == "finished" else None
    whole = newest(points)
    return [
        Training(progress.name, state, progress.line, rounds, progress.rounds, progress.sites, whole, test),
    ]


def _of_log(log: Path, site: str, rounds: int) -> list[Point]:
    text = log.read_text(errors="replace") if log.exists() else ""
    points = [
        # of the global model before a round is trained, of the personal one after it
        Point(site, model, int(number) + (model == PERSONAL), float(dice))
        for number, model, dice in _DICE.findall(text)
    ]
    for before, after in _FINAL.findall(text):
        points += [Point(site, GLOBAL, rounds, float(before)), Point(site, PERSONAL, rounds, float(after), final=True)]
    return points


@lru_cache(maxsize=1)
def _of_earlier(run: Path, names: tuple[str, ...]) -> tuple[Point, ...]:
    """Dice of the global model that earlier starts told: the simulator empties the logs of the sites."""
    if not names:
        return ()
    from pfedsam.report.page import read_curves

    curves = read_curves(run)
    chosen = curves[curves["tag"] == "val_dice_global"]
    rows = zip(chosen["site"], chosen["round"], chosen["value"], strict=True)
    return tuple(Point(site, GLOBAL, int(number), float(value)) for site, number, value in rows)


def _rounds(log: Path) -> int:
    found = _ROUND.findall(log.read_text(errors="replace")) if log.exists() else []
    return int(found[-1]) + 1 if found else 0


def _test(path: Path) -> Test | None:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        sites = results["sites"].items()
        return Test({model: {name: site[f"dice_{model}"] for name, site in sites} for model in (GLOBAL, PERSONAL)})
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
