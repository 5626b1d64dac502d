"""What runs of a deployment is found by its command line, whoever started it, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pfedsam.deployment.processes import Deployment

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
JOB_PROCESS = "nvflare.private.fed.app.client.worker_process"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
#: A command with the root in its own command line that stops the deployment, below another one.
STOPS = """
import subprocess, sys
from pathlib import Path
from pfedsam.deployment.processes import Deployment
if sys.argv[1] == "above":
    raise SystemExit(subprocess.run([sys.executable, "-c", sys.argv[3], "below", *sys.argv[2:]]).returncode)
deployment = Deployment(Path(sys.argv[4]), Path(sys.argv[5]))
print(len(deployment.processes()), deployment.stop())
"""


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path / "runtime", PROJECT)
    yield deployment
    assert deployment.stop() == []


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are no part of the deployment; ended after the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def orphan(*words: str | Path) -> psutil.Process:
    """A process with these words in its command line whose parent is gone."""
    code = (
        "import subprocess, sys; "
        "how = dict(stdout=subprocess.DEVNULL, start_new_session=True); "
        "print(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], **how).pid)"
    )
    command = [sys.executable, "-c", code, SLEEP, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    process = psutil.Process(int(done.stdout))
    while SLEEP not in process.cmdline():
        time.sleep(0.05)
    return process


def test_a_job_process_whose_site_is_gone_is_found_and_stopped(deployment: Deployment) -> None:
    first, second = deployment.sites
    left = orphan("-m", JOB_PROCESS, "-m", deployment.kit(first), "-n", "job")
    assert deployment.processes() == deployment.processes(first) == [left]
    assert deployment.processes(second) == deployment.processes(deployment.server) == []
    assert deployment.stop() == []
    assert not left.is_running() and deployment.processes() == []


def test_what_it_started_is_stopped_with_it(deployment: Deployment) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
    command = [sys.executable, "-c", code, JOB_PROCESS, str(deployment.kit(deployment.sites[0]))]
    process = psutil.Process(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)
    while not (below := process.children()):
        time.sleep(0.05)
    assert deployment.processes() == [process, *below]
    assert deployment.stop() == []
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below)


def test_what_is_not_of_this_deployment_goes_on(deployment: Deployment, others: list[subprocess.Popen[str]]) -> None:
    root = str(deployment.root)
    for words in (
        # another deployment beside it, one around it, and somebody who reads a log
        [JOB_PROCESS, "-m", f"{root}-2/kits/hospital-a"],
        [JOB_PROCESS, "-m", str(deployment.root.parent)],
        ["-f", str(deployment.log(deployment.server))],
    ):
        command = [sys.executable, "-c", SLEEP, *words]
        others.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert others[-1].stdout is not None and others[-1].stdout.readline() == "up\n"
    assert deployment.processes() == []
    assert deployment.stop() == []
    assert [one.poll() for one in others] == [None] * len(others)


def test_a_command_with_the_root_in_its_own_command_line_stops_neither_itself_nor_what_called_it(
    deployment: Deployment,
) -> None:
    left = orphan(JOB_PROCESS, deployment.kit(deployment.server))
    words = ["above", JOB_PROCESS, STOPS, str(deployment.root), str(PROJECT)]
    done = subprocess.run([sys.executable, "-c", STOPS, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split("\n")[0] == "1 []", done.stderr
    assert not left.is_running()
