"""The page about a run that goes on, made from records as the commands leave them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.commands.live import following
from pfedsam.errors import PFedSAMError
from pfedsam.files import append_line
from pfedsam.report.live.curves import curves
from pfedsam.report.live.page import LIVE_FILE, SECONDS, clock, page, write_page
from pfedsam.report.live.view import Point, Training
from pfedsam.storage.progress import PROGRESS_FILE, Progress, read_progress, write_progress

SITES = ["site-1", "site-2"]
ROUNDS = 3
REFRESH = f'<meta http-equiv="refresh" content="{SECONDS}">'


def simulation(run: Path, rounds: int, final: bool = False, state: str = "running", code: str = "") -> Progress:
    """A run folder in which so many rounds are done, as the simulator leaves it."""
    for place, site in enumerate(SITES):
        lines = [f"- INFO - round {n}: global Dice 0.{place + 1}{n}0" for n in range(rounds)]
        lines += [f"- INFO - final personal phase: global Dice 0.{place + 1}50, personal Dice 0.{place + 6}00"] * final
        log = run / "workspace" / site / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"2026-01-01 00:00:00,000 - PFedSAMLearner {line}\n" for line in lines))
    (run / "simulator.log").write_text("".join(f"- INFO - Round {n} finished.\n" for n in range(rounds)))
    progress = Progress("simulation", "north: pfedsam", "pfedsam simulate data --out mine", SITES, ROUNDS, total=20)
    progress.event(3, "round 0: global Dice 0.100")
    if state != "running":
        progress.end(state, code)
    write_progress(run, progress)
    return progress


def comparison(run: Path, **more: object) -> Progress:
    """Two runs that share their rounds, of which one is done, and one that has failed."""
    for number in range(ROUNDS):
        for site in SITES:
            append_line(
                run / "rounds" / "a" / "history.jsonl",
                {"round": number, "site": site, "val_dice_global": 0.1 * (number + 1), "phases": {"global": {}}},
            )
    for site in SITES:
        note = {"round": ROUNDS, "site": site, "val_dice_global": 0.4, "val_dice_personal": 0.7}
        append_line(run / "trainings" / "ft" / "history.jsonl", {**note, "phases": {"final": {}}})
    cases = [{"site": site, "model": "personal", "dice": [0.6]} for site in SITES]
    append_line(run / "runs.jsonl", {"key": "ft", "cases": cases})
    common = {"kind": "federated", "rounds": ROUNDS, "sites": SITES}
    runs = [
        {"name": "ft, seed 0", "key": "ft", "folders": ["rounds/a", "trainings/ft"], **common},
        {"name": "plain, seed 0", "key": "plain", "folders": ["rounds/a", "trainings/plain"], **common},
        {"name": "other, seed 0", "key": "other", "folders": ["trainings/other"], **common},
    ]
    records = str(run / "runs.jsonl")
    progress = Progress("comparison", "on data", "pfedsam compare data", SITES, ROUNDS, runs, records, 30, 12)
    for key, value in more.items():
        setattr(progress, key, value)
    write_progress(run, progress)
    return progress


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html.split("</style>")[1])).split())


def row(html: str, name: str) -> str:
    return next(text_of(f"</style>{line}") for line in html.splitlines() if f'<th scope="row">{name}</th>' in line)


def test_a_running_simulation_is_shown_with_its_rounds_and_loaded_again(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=2)
    write_page(tmp_path)
    html = (tmp_path / LIVE_FILE).read_text()
    assert REFRESH in html
    text = text_of(html)
    assert "running" in text and "Rounds done 2 of 3" in text and "15 %, 3 of 20 events" in text
    assert "pfedsam simulate data --out mine" in text
    assert row(html, "global, start") == "global, start 0.100 0.200 0.150"
    assert row(html, "global, round 1") == "global, round 1 0.110 0.210 0.160"
    assert "final" not in row(html, "global, round 1") and "personal, final phase" not in html


def test_a_finished_simulation_is_not_loaded_again_and_links_its_report(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=ROUNDS, final=True, state="finished")
    results = {site: {"dice_global": 0.5, "dice_personal": 0.75} for site in SITES}
    (tmp_path / "results.json").write_text(json.dumps({"sites": results}))
    write_page(tmp_path)
    html = (tmp_path / LIVE_FILE).read_text()
    assert 'http-equiv="refresh"' not in html
    assert '<a href="report.html">' in html and "finished" in text_of(html)
    assert row(html, "global, round 3") == "global, round 3 0.150 0.250 0.200"
    assert row(html, "personal, final phase") == "personal, final phase 0.600 0.700 0.650"
    assert row(html, "personal, test cases") == "personal, test cases 0.750 0.750 0.750"
    assert "Dice, personal, mean of sites 0.650" in text_of(html)


def test_a_personal_dice_of_zero_is_shown_and_not_the_global_one(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=ROUNDS, final=True, state="finished")
    for site in SITES:
        (tmp_path / "workspace" / site / "log.txt").write_text(
            "x - INFO - final personal phase: global Dice 0.300, personal Dice 0.000\n"
        )
    write_page(tmp_path)
    assert "Dice, personal, mean of sites 0.000" in text_of((tmp_path / LIVE_FILE).read_text())


def test_a_failed_run_says_the_code_and_what_helps(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=1, state="failed", code="E17")
    write_page(tmp_path)
    html = (tmp_path / LIVE_FILE).read_text()
    text = text_of(html)
    assert 'http-equiv="refresh"' not in html
    assert "It has failed" in text and "E17: loss, gradient or parameter is not finite. Lower the learning rate" in text
    assert f"{tmp_path}/simulator.log" in text and "To go on: pfedsam simulate data --out mine" in text


def test_a_run_whose_process_is_gone_was_stopped(tmp_path: Path) -> None:
    progress = simulation(tmp_path, rounds=1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    progress.pid, progress.pid_begun = child.pid, psutil.Process(child.pid).create_time()
    write_progress(tmp_path, progress)
    assert read_progress(tmp_path).state == "running"
    child.kill()
    child.wait()
    assert write_page(tmp_path).state == "stopped"
    text = text_of((tmp_path / LIVE_FILE).read_text())
    assert "It was stopped" in text and "What is done is kept. To go on: pfedsam simulate" in text


def test_a_comparison_shows_shared_rounds_in_every_run_that_has_them(tmp_path: Path) -> None:
    comparison(tmp_path, active={"plain, seed 0": "rounds: round 3 of 3, site-1"}, failed={"other, seed 0": "E09"})
    write_page(tmp_path)
    html = (tmp_path / LIVE_FILE).read_text()
    assert row(html, "ft, seed 0") == "ft, seed 0 done 3 of 3 0.400 0.700 personal 0.600"
    assert row(html, "plain, seed 0") == "plain, seed 0 running 3 of 3 0.300 - -"
    assert row(html, "other, seed 0") == "other, seed 0 failed: E09 0 of 3 - - -"
    assert "plain, seed 0 : round 3 of 3, site-1" in text_of(html)
    assert html.count("<figure>") == 2 and REFRESH in html


def test_a_comparison_with_failed_runs_names_their_codes(tmp_path: Path) -> None:
    comparison(tmp_path, failed={"other, seed 0": "E09"}, state="failed")
    write_page(tmp_path)
    assert "E09: other problem in the site's data." in text_of((tmp_path / LIVE_FILE).read_text())


@pytest.mark.parametrize("what", [simulation, comparison])
def test_it_is_one_closed_file_that_asks_nothing_of_the_outside(what, tmp_path: Path) -> None:
    what(tmp_path, **({"rounds": 2} if what is simulation else {}))
    write_page(tmp_path)
    path = tmp_path / LIVE_FILE
    found: list[tuple[str, str]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.append((tag, ""))
            found.extend((name, value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset"))

    html = path.read_text()
    Tags().feed(html)
    tags = {name for name, value in found if not value}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form"}
    assert {value for _, value in found if value} <= {"data:,", "report.html", "tables.md"}
    assert "default-src 'none'" in html and "url(" not in html and "@import" not in html and "http://" not in html
    assert path.stat().st_mode & 0o777 == (tmp_path / PROGRESS_FILE).stat().st_mode & 0o777 == 0o600


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    progress = simulation(tmp_path, rounds=1)
    training = Training("<b>", "running", "<i>", 1, 3, ["<script>"], [Point("<script>", "global", 0, 0.5)])
    html = page(tmp_path, progress, [training], 0.0, kept=True)
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html


def test_curves_have_a_line_for_each_site_and_a_column_for_the_final_phase() -> None:
    points = [Point(site, "global", number, 0.1 * number) for site in SITES for number in range(ROUNDS + 1)]
    training = Training("run", "done", "", ROUNDS, ROUNDS, SITES, points)
    assert curves(training).count("<polyline") == 2 and ">final<" not in curves(training)
    training.points = [*points, Point("site-1", "personal", ROUNDS, 0.9, final=True)]
    assert curves(training).count("<polyline") == 3 and ">final<" in curves(training)
    for part in ("NaN", "inf"):
        assert part not in curves(Training("run", "running", "", 0, 1, SITES, [Point("site-1", "global", 0, 0.0)]))


def test_watch_once_prints_the_address_and_asks_for_no_reload(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=1)
    done = CliRunner().invoke(app, ["watch", str(tmp_path), "--once"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / LIVE_FILE).as_uri() in done.output.replace("\n", "")
    html = (tmp_path / LIVE_FILE).read_text()
    assert 'http-equiv="refresh"' not in html and "keeps it up to date" in html


def test_watch_ends_with_the_run_and_says_how(tmp_path: Path) -> None:
    simulation(tmp_path, rounds=1, state="failed", code="E17")
    done = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert done.exit_code == 1 and "failed" in done.output and "E17" in done.output


@pytest.mark.parametrize("content", [None, "{", "[]", '{"what": "simulation"}'])
def test_a_folder_without_progress_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PROGRESS_FILE).write_text(content)
    with pytest.raises(PFedSAMError, match=r"E33.*pfedsam simulate"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (None, "finished", ""),
        (PFedSAMError("E07", "case patient-4711 has label 9."), "failed", "E07"),
        (ValueError("patient-4711"), "failed", "E99"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_a_command_leaves_how_it_ended_and_names_no_case(
    error: BaseException | None, state: str, code: str, tmp_path: Path
) -> None:
    progress = Progress("simulation", "north", "pfedsam simulate", SITES, ROUNDS, total=4)
    caught = None
    try:
        with following(tmp_path, progress, live=True) as follow:
            follow(1, "round 0: global Dice 0.100")
            assert REFRESH in (tmp_path / LIVE_FILE).read_text() and read_progress(tmp_path).done == 1
            if error:
                raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    left = read_progress(tmp_path)
    assert (left.state, left.code) == (state, code)
    html = (tmp_path / LIVE_FILE).read_text()
    assert 'http-equiv="refresh"' not in html and "4711" not in html + (tmp_path / PROGRESS_FILE).read_text()


def test_a_second_command_in_the_folder_leaves_the_file_of_the_first(tmp_path: Path) -> None:
    first = simulation(tmp_path, rounds=1)
    first.pid, first.pid_begun = psutil.Process().ppid(), psutil.Process(psutil.Process().ppid()).create_time()
    write_progress(tmp_path, first)
    before = (tmp_path / PROGRESS_FILE).read_bytes()
    with following(tmp_path, Progress("simulation", "x", "x", SITES, 1), live=False) as follow:
        follow(1, "x")
    assert (tmp_path / PROGRESS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "?"), (-3.0, "0:00:00"), (3725.4, "1:02:05"), (2 * 86400 + 7300.0, "2 d 2 h")]
)
def test_durations_fit_a_tile(seconds: float | None, shown: str) -> None:
    assert clock(seconds) == shown


def test_many_points_have_one_marker_a_line() -> None:
    sites = [f"site-{number}" for number in range(12)]
    points = [Point(site, "global", number, 0.5) for site in sites for number in range(20)]
    drawn = curves(Training("run", "running", "", 19, 40, sites, points))
    assert len(re.findall(r'class="c\d full"', drawn)) == drawn.count("<polyline") == len(sites)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["begun", "running", "finished", "stopped", "failed", "comparison", "comparison failed"]
)
def test_in_a_real_browser(what: str, tmp_path: Path, in_browser: Callable[[Path], dict[str, Any]]) -> None:
    if what.startswith("comparison"):
        comparison(
            tmp_path, **({"failed": {"other, seed 0": "E09"}, "state": "failed"} if what.endswith("failed") else {})
        )
    else:
        rounds, state = {"begun": 0, "finished": ROUNDS}.get(what, 2), "running" if what == "begun" else what
        simulation(tmp_path, rounds, what == "finished", state, "E07" if what == "failed" else "")
    # a page that is loaded again every few seconds would go away under the browser's checks
    write_page(tmp_path, kept=False)
    assert in_browser(tmp_path / LIVE_FILE)["keys"]["in_order"]
