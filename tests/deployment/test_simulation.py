"""A simulation with real processes: every end of its parent ends them all, and what goes on is the same run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from leftovers import left_of

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.jobs import make_job
from pfedsam.deployment.simulation import Simulation
from pfedsam.deployment.simulator import run
from pfedsam.files import read_safetensors
from pfedsam.storage.site_model import read

pytestmark = pytest.mark.slow

TINY = {"backbone": "vit_test", "image_size": 64, "batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "data"
    write_phantom(folder, sites=2, cases=4, shape=(48, 48, 8))
    return folder


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda one: one.name)
def test_every_end_of_a_simulation_ends_all_its_processes_and_it_goes_on(
    by: signal.Signals, data: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "run", tmp_path / "said.txt"
    command = [sys.executable, "-m", "pfedsam.cli", "simulate", str(data), "--out", str(out), "--rounds", "2"]
    command += [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    with said.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    above, log = psutil.Process(process.pid), out / "simulator.log"
    limit = time.monotonic() + 300
    while not (log.exists() and "Round 1 started" in log.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < limit, said.read_text()
        time.sleep(0.2)
    below = above.children(recursive=True)
    assert sum("simulator_worker".startswith(one.name()) for one in below) == 2
    process.send_signal(by)
    code = process.wait(60)
    # after SIGKILL nobody waits for them
    assert left_of(below, 20 if by == signal.SIGKILL else 2) == []
    if by != signal.SIGKILL:
        assert code == 128 + by
        last = said.read_text().splitlines()[-1]
        assert last.startswith(f"stopped by {by.name}. To go on: pfedsam simulate ") and str(out) in last
        assert "Traceback" not in said.read_text()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Round 0 started" not in log.read_text(errors="replace"), "it began anew"


@pytest.mark.parametrize("strategy", ["pfedsam", "local_phase_each_round"])
def test_a_run_of_two_rounds_that_gets_a_third_is_a_run_of_three_rounds(
    strategy: str, data: Path, tmp_path: Path
) -> None:
    """Its final phase starts from the personal part after the last round, not from what an earlier one has fitted."""
    found = []
    for name, numbers in (("longer", (2, 3)), ("whole", (3,))):
        for rounds in numbers:
            out = tmp_path / name
            job = str(make_job(strategy, out / "template"))
            simulation = Simulation(data, out, job, rounds=rounds, overrides=TINY, processes=2)
            assert run(simulation)
        found.append(simulation)
    longer, whole = found
    theta, wanted = (read_safetensors(one.global_model)[0] for one in found)
    assert all((theta[name] - wanted[name]).abs().max() < 1e-5 for name in wanted)
    for site, entry in whole.states().items():
        mine, theirs = read(longer.states()[site].file), read(entry.file)
        assert mine.personal and mine.personal.keys() == theirs.personal.keys()
        for name, tensor in theirs.personal.items():
            assert (mine.personal[name] - tensor).abs().max() < 1e-5, name
