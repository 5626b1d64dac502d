"""What the server's log of a job tells, in the words in which NVFlare and our components write it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from pfedsam.commands import job_watch
from pfedsam.commands.job_watch import headline, site_line, site_table
from pfedsam.deployment.job_log import read_job_log, refusal
from pfedsam.deployment.job_view import JobView
from pfedsam.errors import ErrorCode
from pfedsam.federated.aggregators import told
from pfedsam.training.judgement import Judgement

_WHERE = "[identity=lesions, run=52f35704, wf=scatter_and_gather, peer=b, peer_run=52f35704, peer_rc={}, task_id=1]"
_LINES = (
    ("00:00", "ScatterAndGather - INFO - [identity=lesions, run=52f35704, wf=scatter_and_gather] - Round 0 started."),
    ("00:09", f"ServerRunner - ERROR - {_WHERE.format('SITE_REFUSED:E06')} - Aborting current RUN"),
    ("00:10", "LeastSites - WARNING - round 0: 1 of 2 sites took part: a; missing: b"),
    ("00:10", "RobustAggregator - INFO - round 0: site a: {}, share 1.00"),
    ("00:10", "ScatterAndGather - INFO - [identity=lesions, run=52f35704, wf=scatter_and_gather] - Round 0 finished."),
    ("00:10", "ScatterAndGather - INFO - [identity=lesions, run=52f35704, wf=scatter_and_gather] - Round 1 started."),
    ("00:12", "RobustModelSelector - INFO - round 1: site a: validation Dice of the global model 0.41"),
    ("00:20", "LeastSites - INFO - round 1: 2 of 2 sites took part: a, b"),
    ("00:20", "ScatterAndGather - INFO - [identity=lesions, run=52f35704, wf=scatter_and_gather] - Round 1 finished."),
    ("00:20", "ScatterAndGather - INFO - [identity=lesions, run=52f35704, wf=scatter_and_gather] - Round 2 started."),
)
_LATE = (
    ("00:31", "IncomingGuard - ERROR - result of site b refused: E20: the update is of round [1], this is round 2."),
    ("00:40", "FinalPersonalPhase - INFO - final personal phase: site a is done"),
    (
        "00:40",
        "FinalPersonalPhase - WARNING - final personal phase: site b failed with EXECUTION_EXCEPTION (see log)",
    ),
)


def lines(*more: tuple[str, str], judged: Judgement | None = None) -> list[str]:
    update = told(judged or Judgement(12, 12.0, 0.9851234))
    texts = [(time, text.format(update) if "share" in text else text) for time, text in (*_LINES, *more)]
    return [f"2026-11-28 10:{time},250 - {text}" for time, text in texts]


def view(seen_lines: list[str], status: str = "RUNNING", rounds: int | None = 5) -> JobView:
    seen = read_job_log(seen_lines, ["a", "b", "c"])
    return JobView("52f35704", "lesions", status, "scatter_and_gather", rounds, seen, connected=frozenset("ab"))


def test_rounds_and_sites_are_told() -> None:
    seen = read_job_log(lines(), ["c"])
    assert list(seen.sites) == ["a", "b", "c"] and (seen.first, seen.current, seen.closed) == (0, 2, 1)
    a, b, c = seen.sites.values()
    assert (a.rounds, a.missing, a.last, a.cases, a.norm, a.share, a.dice) == (2, [], 1, 12, 0.985, 1.0, 0.41)
    assert (b.rounds, b.missing, b.last, b.norm, b.problem) == (1, [0], 1, None, "")
    assert (c.rounds, c.last, c.dice) == (0, None, None)
    # before it took part again
    assert read_job_log(lines()[:5]).sites["b"].problem == "E06"


@pytest.mark.parametrize(
    "judged",
    [
        Judgement(12, 5.0, 0.5, why="direction: unlike the others, norm 3", cosine=-0.2),
        Judgement(12, 0.0, 0.5, why="length: far longer", clipped_to=0.25),
        Judgement(12, 12.0, 0.5, clipped_to=0.25, cosine=0.8),
    ],
)
def test_an_update_that_counted_less_is_read_too(judged: Judgement) -> None:
    site = read_job_log(lines(judged=judged)).sites["a"]
    assert (site.cases, site.norm, site.share) == (12, 0.5, 1.0)


def test_the_time_left_is_that_of_the_rounds() -> None:
    seen = read_job_log(lines())
    # two rounds of 10 s, 3 are left, 4 s of the third have passed
    assert seen.left(5, waited=4) == pytest.approx(26)
    assert read_job_log(lines()[:4]).left(5) is None and read_job_log([]).left(5) is None


def test_a_resumed_job_counts_from_where_it_began_and_a_log_that_was_cut_from_the_first() -> None:
    resumed = [line.replace("ound 1 ", "ound 8 ").replace("ound 2 ", "ound 9 ") for line in lines()[5:]]
    seen = read_job_log(resumed)
    assert (seen.first, seen.closed) == (8, 8)
    assert JobView("x", "x", "RUNNING", "", 4, seen).end == 12
    assert JobView("x", "x", "RUNNING", "", 20, seen, cut=True).end == 20
    # one round of 10 s: 11 are left
    assert JobView("x", "x", "RUNNING", "", 20, seen, cut=True).left() == pytest.approx(110)


def test_what_is_shown() -> None:
    shown = Console(width=260)
    seen = view(lines(*_LATE))
    with shown.capture() as captured:
        shown.print(site_table(seen))
    a, b, c = (line for line in captured.get().splitlines() if line.startswith(("│ a", "│ b", "│ c")))
    assert all(word in a for word in ("yes", "2 of 2", "12", "0.985", "1.00", "0.41", "final phase: done"))
    assert all(word in b for word in ("1 of 2", "refused: E20, ", "missing in round 0", "failed with EXECUTION")), b
    assert " no " in c and c.count(" - ") == 6
    assert headline(seen) == "52f35704 lesions: RUNNING, 2 of 5 rounds done, scatter_and_gather, left: 0:00:27"
    # what comes after the rounds has no known length
    assert headline(view(lines(), rounds=2)) == "52f35704 lesions: RUNNING, 2 of 2 rounds done, scatter_and_gather"
    assert headline(view(lines(), "FINISHED:COMPLETED")) == "52f35704 lesions: FINISHED:COMPLETED, 2 of 5 rounds done"
    assert headline(view([], "SUBMITTED", None)) == "52f35704 lesions: SUBMITTED, scatter_and_gather"
    assert site_line("a", seen.seen.sites["a"]) == "a (norm 0.985, Dice 0.41)"
    assert site_line("b", seen.seen.sites["b"]) == "b (E20)" and site_line("c", seen.seen.sites["c"]) == "c"


@pytest.mark.parametrize("terminal", [True, False])
def test_following_ends_with_the_job_and_in_a_log_there_is_a_line_for_each_round(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(job_watch, "console", Console(file=shown, force_terminal=terminal, width=260))
    monkeypatch.setattr(job_watch, "SECONDS", 0.0)
    first, *later = (view(lines()[:5]), view(lines()[:5]), view(lines()), view(lines(*_LATE), "FINISHED:COMPLETED"))
    answers = iter(later)
    last = job_watch.follow(SimpleNamespace(look=lambda: next(answers)), first)
    assert last.completed and next(answers, None) is None
    text = shown.getvalue()
    for word in ("1 of 5 rounds done", "2 of 5 rounds done", "FINISHED:COMPLETED", "E20"):
        assert word in text
    log = [line for line in text.splitlines() if "; a (norm 0.985" in line]
    assert len(log) == (0 if terminal else 2), log


def test_a_code_of_a_site_is_told_in_words() -> None:
    assert "versions" in refusal("E22") and refusal("E06") == ErrorCode.TOO_FEW_CASES.meaning
    assert refusal("E98") == "an unknown code"
