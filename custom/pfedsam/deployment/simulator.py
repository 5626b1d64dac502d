"""NVFlare's simulator on a folder of site folders, as a process of its own: one run at a time, which can go on."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.run_terms import keep_terms
from pfedsam.deployment.simulation import Simulation
from pfedsam.deployment.simulation_starts import (
    is_finished,
    keep_global_model,
    keep_start,
    put_states_back,
    require_same_run,
)
from pfedsam.deployment.simulator_process import begun, tell
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.records import PROGRESS_LINE
from pfedsam.storage.run_folder import move_aside
from pfedsam.storage.state import ROOT_VARIABLE

_PROBLEM = re.compile(r"\b(E\d\d): (.*)")


def run(
    simulation: Simulation,
    event: Callable[[str], None] | None = None,
    process: subprocess.Popen[str] | None = None,
) -> bool:
    """Run the federation, or what is left of it.

    Args:
        simulation: what to run.
        event: called with a line for each thing that a person waits for (a validation, a phase).
        process: a simulator that has begun already, see `simulator_process.begun`.

    Returns:
        False if everything was done before.

    Raises:
        PFedSAMError: E25 if the folder holds another run, E14 if another process works in it; else with the code and
            line of the first site that failed.
    """
    with _alone(simulation.out):
        return _run(simulation, event, process)


def begin_anew(simulation: Simulation) -> Path | None:
    """Move the run that is in the folder aside; returns where it is then, None if there was none.

    Raises:
        PFedSAMError: E14 if another process works in it.
    """
    with _alone(simulation.out):
        return move_aside(simulation.out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        message = f"another simulation runs in {out}."
        raise PFedSAMError(ErrorCode.STATE_IN_USE, message, "Wait for it, or give another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _run(simulation: Simulation, event: Callable[[str], None] | None, process: subprocess.Popen[str] | None) -> bool:
    keep_terms(simulation.out, {**require_same_run(simulation), "data": str(simulation.data.resolve())})
    rounds = simulation.rounds_in_all
    keep_global_model(simulation)
    done = simulation.rounds_done
    if done >= rounds and is_finished(simulation, rounds):
        return False
    keep_start(simulation)
    put_states_back(simulation, done)
    job = export_job(
        find_job(simulation.job),
        simulation.out / "job",
        plan=simulation.plan,
        server={"num_rounds": rounds - done, "start_round": done, "min_clients": len(simulation.sites)},
        persistor={"source_ckpt_file_full_name": simulation.global_model.name} if done else {},
        force=True,
    )
    if done:
        shutil.copy(simulation.global_model, job / "app" / "config")
    log = simulation.out / "simulator.log"
    simulate = _simulate if process is None else partial(_simulate, process=process)
    simulate(simulation, job, log, event)
    keep_global_model(simulation)
    if not is_finished(simulation, rounds):
        raise _first_problem(simulation) or PFedSAMError(
            ErrorCode.UNEXPECTED, f"the simulation did not finish, see {log}.", "Start it again to go on."
        )
    return True


def _simulate(
    simulation: Simulation,
    job: Path,
    log: Path,
    event: Callable[[str], None] | None,
    process: subprocess.Popen[str] | None = None,
) -> None:
    """Let the simulator run the job to its end, and report what a person waits for."""
    sites = simulation.sites
    processes = min(simulation.processes or len(sites), len(sites))
    arguments = [str(job.resolve()), "-w", str(simulation.workspace.resolve()), "-c", ",".join(sites)]
    environment = {
        "PFEDSAM_DATA": str(simulation.data.resolve()),
        ROOT_VARIABLE: str(simulation.state_root.resolve()),
    }
    with log.open("w", buffering=1) as file, nullcontext(process) if process else begun() as simulator:
        for line in tell(simulator, [*arguments, "-t", str(processes)], environment):
            file.write(line)
            if event and (news := PROGRESS_LINE.search(line)):
                event(news.group(1).strip())


def _first_problem(simulation: Simulation) -> PFedSAMError | None:
    """The first error of ours in the logs of the sites and the server."""
    for name in (*simulation.sites, "server"):
        path = simulation.workspace / name / "error_log.txt"
        match = _PROBLEM.search(path.read_text(errors="replace")) if path.exists() else None
        if match:
            return PFedSAMError(match.group(1), f"{name}: {match.group(2)}", f"See {path}.")
    return None
