"""What is started for a process ends with it, also in sessions of its own, and with every signal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from leftovers import gone, left_of

#: Starts a process in a session of its own, as NVFlare's simulator does for each site, tells both numbers, and waits.
TREE = """
import os, subprocess, sys, time
how = dict(start_new_session=True)
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], **how)
print(os.getpid(), below.pid, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""
#: A process that runs the tree as `pfedsam simulate` runs the simulator.
PARENT = """
import subprocess, sys
from pfedsam.children import end, supervised
with subprocess.Popen(supervised(sys.argv[1:]), stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
    try:
        print(process.pid, process.stdout.readline(), flush=True)
        process.wait()
    except BaseException:
        end(process)
        raise
"""
#: Starts a process as `pfedsam compare` does, which sees no event for minutes.
COMPUTES = """
import multiprocessing
from pfedsam.children import begin
process = multiprocessing.get_context("spawn").Process(target=begin, args=("time:sleep", 600))
process.start()
print(process.pid, flush=True)
process.join()
"""
#: A command that waits below `ends_in_order`.
WAITS = """
import sys, time
from pfedsam.commands.interrupts import ends_in_order
with ends_in_order("To go on: here"):
    try:
        print("up", flush=True)
        time.sleep(600)
    finally:
        time.sleep(1)
        open(sys.argv[1], "w").write("clean")
"""


def read_numbers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    assert process.stdout is not None
    return [psutil.Process(int(word)) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_tree_ends_with_the_process_that_it_runs_for(by: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, sys.executable, "-c", TREE, "wait"]
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **how)
    tree = read_numbers(process)
    assert len(tree) == 3 and not any(gone(one) for one in tree)
    process.send_signal(by)
    assert process.wait(30) != 0
    # where it could act, nothing is left already when it ends
    assert left_of(tree, 0 if by == signal.SIGINT else 20) == []


def test_a_process_of_multiprocessing_that_never_looks_ends_with_its_parent() -> None:
    process = subprocess.Popen([sys.executable, "-c", COMPUTES], stdout=subprocess.PIPE, text=True)
    (below,) = read_numbers(process)
    process.kill()
    process.wait()
    assert left_of([below], 20) == []


def test_a_command_that_ends_by_itself_gives_its_code_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "pfedsam.children", str(os.getpid()), sys.executable, "-c", TREE, "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree = read_numbers(process)
    assert left_of(tree[:1], 20) == []
    time.sleep(1)
    process.send_signal(signal.SIGTERM)  # what it has left is not waited for any longer
    assert process.wait(30) == 3
    assert left_of(tree, 0) == []


def test_nothing_starts_for_a_process_that_is_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    command = [sys.executable, "-m", "pfedsam.children", str(ended.pid), sys.executable, "-c", TREE, "wait"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == ""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
def test_every_signal_ends_a_command_in_order_and_the_last_line_says_how_to_go_on(
    by: signal.Signals, tmp_path: Path
) -> None:
    process = waiting(tmp_path, {one: signal.SIG_DFL for one in (signal.SIGINT, signal.SIGHUP)})
    process.send_signal(by)
    time.sleep(0.3)
    process.send_signal(by)  # an impatient second time
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + by
    assert said.splitlines()[-1] == f"stopped by {by.name}. To go on: here"
    assert (tmp_path / "done").read_text() == "clean"


def test_a_command_below_nohup_goes_on_when_its_terminal_closes(tmp_path: Path) -> None:
    process = waiting(tmp_path, {signal.SIGHUP: signal.SIG_IGN})
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_terminal_that_is_gone_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    code = WAITS.replace("time.sleep(1)", "print('cleaning', flush=True)")
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it would be ignored here, too
        os.execv(sys.executable, [sys.executable, "-c", code, str(tmp_path / "done")])
    assert b"up" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert (tmp_path / "done").read_text() == "clean"


def waiting(folder: Path, how: dict[signal.Signals, signal.Handlers]) -> subprocess.Popen[str]:
    def prepare() -> None:
        for one, action in how.items():
            signal.signal(one, action)

    command = [sys.executable, "-c", WAITS, str(folder / "done")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=prepare)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process
