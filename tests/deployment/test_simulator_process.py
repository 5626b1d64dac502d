"""Sites that are forked from one process: each is a process of its own, as if it had been started."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

#: What NVFlare would start with `python -m`: it writes down what it finds, and waits to be ended.
SITE = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np

found = {
    "name": __name__,
    "arguments": sys.argv[1:],
    "own session": os.getsid(0) == os.getpid(),
    "word": os.environ.get("WORD"),
    "variables": len(os.environ),
    "ends by": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "draw": int(np.random.randint(2**31)),
}
Path(sys.argv[1]).write_text(json.dumps(found))
if sys.argv[2] == "waits":
    time.sleep(600)
raise SystemExit(3)
"""
#: The simulator's part. The nursery imports nothing: what it imports is not what is looked at here.
SIMULATOR = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil
from pfedsam.deployment import simulator_process

simulator_process.LIBRARIES = ()
nursery = simulator_process.Nursery()
(its_process,) = psutil.Process().children()
folder = Path(sys.argv[1])

def started(name, how):
    variables = {"PYTHONPATH": str(folder), "WORD": name}
    command = [sys.executable, "-m", "a_site", str(folder / name), how]
    return nursery.start(command, env=variables, preexec_fn=os.setsid)

def until(holds):
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)

told = {}
one, two, ends = started("one", "waits"), started("two", "waits"), started("ends", "ends")
until(lambda: all((folder / name).exists() and (folder / name).read_text() for name in ("one", "two", "ends")))
told["forked"] = [type(site).__name__ for site in (one, two, ends)]
ends.wait(60)
told["running"] = [site.poll() is None for site in (one, two, ends)]
try:
    one.wait(0.1)
except subprocess.TimeoutExpired:
    told["waits"] = True
one.terminate(), one.wait(60), two.kill(), two.wait(60)
told["left"] = [site.poll() is None for site in (one, two)]
its_process.kill()
last = started("last", "ends")
told["without a nursery"] = [type(last).__name__, last.wait(60)]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nursery")
    (folder / "a_site.py").write_text(SITE)
    done = subprocess.run([sys.executable, "-c", SIMULATOR, str(folder)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    sites = {name: json.loads((folder / name).read_text()) for name in ("one", "two", "ends", "last")}
    return {**json.loads(done.stdout), "folder": str(folder), "sites": sites}


def test_a_forked_site_finds_what_a_started_one_finds(told: dict[str, Any]) -> None:
    assert told["forked"] == ["Forked"] * 3 and told["without a nursery"][0] == "Popen"
    draws = [site.pop("draw") for site in told["sites"].values()]
    forked, started = told["sites"]["ends"], told["sites"]["last"]
    assert forked["variables"] >= 2  # the interpreter may add some of its own
    for site in (forked, started):
        del site["variables"]
    same = {"name": "__main__", "own session": True, "ends by": True}
    assert forked == {**same, "word": "ends", "arguments": [f"{told['folder']}/ends", "ends"]}
    assert started == {**same, "word": "last", "arguments": [f"{told['folder']}/last", "ends"]}
    assert len(set(draws)) == len(draws), "sites draw the same numbers"


def test_the_simulator_waits_for_a_forked_site_and_ends_it(told: dict[str, Any]) -> None:
    assert told["running"] == [True, True, False] and told["waits"] and told["left"] == [False, False]


def test_without_a_nursery_a_site_is_started(told: dict[str, Any]) -> None:
    assert told["without a nursery"] == ["Popen", 3]


def test_a_simulator_that_is_told_nothing_ends() -> None:
    command = [sys.executable, "-m", "pfedsam.deployment.simulator_process"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
