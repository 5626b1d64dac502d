"""What the commands share."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from pfedsam.commands import console


def test_a_bar_estimates_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=120))
    with console.bar("runs", 100) as advance:
        for done in range(1, 6):
            advance(done, f"run {done}")
            time.sleep(0.25)  # a step a quarter of a second: 95 more take about 24 s
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    left = [int(seconds) for seconds in re.findall(r"left: 0:00:(\d\d)", text)]
    assert left and 15 <= left[-1] <= 45
    assert "run 5" in text and "5/100" in text


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_long_text_does_not_cut_the_time_left_off(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=width))
    with console.bar("runs", 1000) as advance:
        advance(1, "fedavg_lora_ft_interpolated, seed 0: tested on case_western_st_joseph, Dice 0.712")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert len(last) <= width
    assert "feda" in last and "1/1000" in last
    assert re.search(r"left: (\d+:\d\d:\d\d|-:--:--)$", last)


@pytest.mark.parametrize(("between", "expected"), [(0.0, ["1", "2", "3"]), (60.0, [])])
def test_a_log_gets_lines_with_the_time_left(
    between: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, width=80))
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", between)
    with console.bar("runs", 100) as advance:
        for done in range(1, 4):
            time.sleep(0.1)
            advance(done, f"run {done}, tested on a hospital with a very long name that is not cut off in a log")
    lines = [line for line in shown.getvalue().splitlines() if "passed:" in line]
    assert (
        re.findall(r"log: (\d) of 100, passed: 0:00:\d\d, left: (?:\?|0:0\d:\d\d)$", "\n".join(lines), re.M) == expected
    )


def test_brackets_in_a_text_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=shown, force_terminal=True, width=120))
    with console.bar("runs", 2) as advance:
        advance(1, "a strategy named [bold]")
    assert "a strategy named [bold]" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())


def test_bars_of_other_libraries_are_not_drawn_between_ours() -> None:
    ours = "from pfedsam.commands.console import quiet_libraries; quiet_libraries()"
    code = f"{ours}; from tqdm import tqdm; list(tqdm([1]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
