"""A comparison while it runs: the histories of its trainings, and the records of the runs that are done.

A run in `Progress.runs` has `name`, `kind`, `key`, `rounds`, `sites`, and `folders`: of its trainings in the
comparison's folder, those that it shares with others first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.files import read_lines
from pfedsam.report.live.view import GLOBAL, PERSONAL, Point, Test, Training, newest
from pfedsam.storage.progress import Progress


def trainings(run: Path, progress: Progress) -> list[Training]:
    """Every run of a comparison.

    Args:
        run: folder of the comparison.
        progress: of its command.
    """
    records = {record["key"]: record for record in read_lines(Path(progress.records)) if "key" in record}
    return [_training(run, planned, progress, records.get(planned["key"])) for planned in progress.runs]


def _training(run: Path, planned: Mapping[str, Any], progress: Progress, record: Mapping[str, Any] | None) -> Training:
    name, rounds = planned["name"], planned["rounds"]
    notes = [note for folder in planned["folders"] for note in read_lines(run / folder / "history.jsonl")]
    done = max((note["round"] + 1 for note in notes), default=0)
    state, now = "waiting", ""
    if name in progress.active:
        state, now = "running", progress.active[name]
    elif name in progress.failed:
        state, now = "failed", progress.failed[name]
    elif record is not None:
        state, now = "done", "tested"
    elif notes:
        state = "waiting" if progress.state == "running" else "stopped"
    # without a federation there is no global model to speak of
    models = (GLOBAL, PERSONAL) if planned["kind"] == "federated" else (PERSONAL,)
    points = newest(point for note in notes for point in _points(note, rounds) if point.model in models)
    test = _test(record) if record else None
    return Training(name, state, now, min(done, rounds), rounds, planned["sites"], points, test)


def _points(note: Mapping[str, Any], rounds: int) -> list[Point]:
    """Of a note of a round and site: the global model before its training, the personal one after it."""
    number, site, final = note["round"], note["site"], note["round"] == rounds
    before, after = note.get("val_dice_global"), note.get("val_dice_personal")
    points = [] if before is None else [Point(site, GLOBAL, number, before)]
    if after is not None and (not final or note["phases"]):
        points.append(Point(site, PERSONAL, number + (not final), after, final))
    return points


def _test(record: Mapping[str, Any]) -> Test | None:
    """Mean over cases and classes, of each model and site."""
    by_site: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for case in record["cases"]:
            by_site[case["model"]][case["site"]].append(sum(case["dice"]) / len(case["dice"]))
    except (TypeError, KeyError, ZeroDivisionError):
        return None
    means = {model: {site: sum(dice) / len(dice) for site, dice in sites.items()} for model, sites in by_site.items()}
    return Test(means)
