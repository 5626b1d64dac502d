"""A federation on one machine: NVFlare's simulator on a folder of site folders, resumable, then the evaluation."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedsam.data.sites import site_names
from pfedsam.errors import PFedSAMError
from pfedsam.federated.jobs import export_job, find_job, plan_settings, server_settings
from pfedsam.federated.records import NEWS
from pfedsam.files import write_atomically
from pfedsam.global_model import round_of
from pfedsam.run_folder import EARLIER, RUN, SENT_FILE, WORKSPACE, bytes_by_round, starts
from pfedsam.state import ROOT_VARIABLE, StateEntry, newest_states

_PROBLEM = re.compile(r"\b(E\d\d): (.*)")


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Args:
        data: folder that holds the site folders.
        out: run folder; everything is written below it.
        job: name or path of a job.
        federation: name of the federation.
        bundle: name of an installed bundle, None for the job's own.
        rounds: number of rounds in all, None for the job's own.
        overrides: listed ids of the bundle's configuration.
        strategy: phases and groups that replace the job's own, by key.
        chosen: names of the sites that take part; by default all in `data`.
        processes: sites that train at the same time; by default all. With fewer, NVFlare builds every site anew for
            every task, which costs its start and its feature cache each time.
    """

    data: Path
    out: Path
    job: str = "pfedsam"
    federation: str = "simulation"
    bundle: str | None = None
    rounds: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    processes: int | None = None

    @property
    def sites(self) -> list[str]:
        """Names of the site folders.

        Raises:
            PFedSAMError: E02 if there are fewer than two.
        """
        names = [name for name in site_names(self.data) if not self.chosen or name in self.chosen]
        if len(names) < 2:
            raise PFedSAMError(
                "E02",
                f"{self.data} holds {len(names)} site folder(s), at least 2 are needed.",
                "Lay it out as <data>/<site>/images and <data>/<site>/labels, or make one with `pfedsam phantom`.",
            )
        return names

    @property
    def workspace(self) -> Path:
        """NVFlare's workspace; the simulator empties it at the start."""
        return self.out / WORKSPACE

    @property
    def settings(self) -> dict[str, Any]:
        """All overrides of the bundle: the job's own, and `overrides` on top."""
        return {**(plan_settings(find_job(self.job)).get("overrides") or {}), **self.overrides}

    @property
    def state_root(self) -> Path:
        """Where the simulated sites keep their state."""
        return self.out / "state"

    @property
    def global_model(self) -> Path:
        """The last global model, kept outside the workspace."""
        return self.out / "global_model.safetensors"

    def states(self) -> dict[str, StateEntry]:
        """The newest state of each site in this federation."""
        return newest_states(self.state_root, self.federation)


def run(simulation: Simulation, event: Callable[[str], None] | None = None) -> bool:
    """Run the federation, or what is left of it.

    Args:
        simulation: what to run.
        event: called with a line for each thing that a person waits for (a validation, a phase).

    Returns:
        False if everything was done before.

    Raises:
        PFedSAMError: with the code and line of the first site that failed.
    """
    source = find_job(simulation.job)
    rounds = simulation.rounds or int(server_settings(source)["num_rounds"])
    _harvest(simulation)
    done = round_of(simulation.global_model) + 1 if simulation.global_model.exists() else 0
    if done >= rounds and _finished(simulation, rounds):
        return False
    _keep_start(simulation)
    plan = plan_settings(source)
    job = export_job(
        source,
        simulation.out / "job",
        plan={
            "federation": simulation.federation,
            "bundle": simulation.bundle or plan["bundle"],
            "overrides": simulation.settings,
            "strategy": {**plan["strategy"], **simulation.strategy},
        },
        server={"num_rounds": rounds - done, "start_round": done, "min_clients": len(simulation.sites)},
        persistor={"source_ckpt_file_full_name": simulation.global_model.name} if done else {},
    )
    if done:
        shutil.copy(simulation.global_model, job / "app" / "config")
    log = simulation.out / "simulator.log"
    _simulate(simulation, job, log, event)
    _harvest(simulation)
    if not _finished(simulation, rounds):
        raise _first_problem(simulation) or PFedSAMError(
            "E99", f"the simulation did not finish, see {log}.", "Start it again to go on."
        )
    return True


def expected_events(simulation: Simulation, rounds: int) -> int:
    """How many events `run` reports for a whole run."""
    strategy = {**plan_settings(find_job(simulation.job))["strategy"], **simulation.strategy}
    done = round_of(simulation.global_model) + 1 if simulation.global_model.exists() else 0
    a_round = 1 + len(strategy["phases"])
    return len(simulation.sites) * ((rounds - done) * a_round + len(strategy.get("final", ())) + 1)


def sent_bytes(simulation: Simulation) -> dict[str, dict[int, int]]:
    """Bytes of tensors that left each site, by round, as its own filter recorded them."""
    found = starts(simulation.out)
    return {site: bytes_by_round(one / site / RUN / SENT_FILE for one in found) for site in simulation.sites}


def _simulate(simulation: Simulation, job: Path, log: Path, event: Callable[[str], None] | None) -> None:
    """Run the simulator as a process of its own, and report what a person waits for."""
    sites = simulation.sites
    processes = min(simulation.processes or len(sites), len(sites))
    command = [
        *(sys.executable, "-m", "nvflare.cli", "simulator", str(job.resolve())),
        *("-w", str(simulation.workspace.resolve()), "-c", ",".join(sites), "-t", str(processes)),
    ]
    environment = {
        **os.environ,
        "PFEDSAM_DATA": str(simulation.data.resolve()),
        ROOT_VARIABLE: str(simulation.state_root.resolve()),
        "PYTHONWARNINGS": "ignore",
    }
    with (
        log.open("w", buffering=1) as file,
        # a group of its own, so that it ends with all the processes that it starts
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if event and (news := NEWS.search(line)):
                    event(news.group(1).strip())
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _first_problem(simulation: Simulation) -> PFedSAMError | None:
    """The first error of ours in the logs of the sites and the server."""
    for name in (*simulation.sites, "server"):
        path = simulation.workspace / name / "error_log.txt"
        found = _PROBLEM.search(path.read_text(errors="replace")) if path.exists() else None
        if found:
            return PFedSAMError(found.group(1), f"{name}: {found.group(2)}", f"See {path}.")
    return None


def _harvest(simulation: Simulation) -> None:
    """Keep the last global model before the simulator empties its workspace."""
    newest = simulation.workspace / "server" / RUN / "app_server" / "global_model.safetensors"
    kept = simulation.global_model
    if newest.exists() and (not kept.exists() or round_of(newest) > round_of(kept)):
        write_atomically(kept, newest.read_bytes())


def _keep_start(simulation: Simulation) -> None:
    """Keep what a start tells of its rounds, curves and what was sent, before the simulator empties its workspace."""
    workspace, earlier = simulation.workspace, simulation.out / EARLIER
    told = [*workspace.glob(f"*/{RUN}/{SENT_FILE}"), *workspace.glob(f"server/{RUN}/tb_events/*/*")]
    if not told:
        return
    kept = earlier / str(len(list(earlier.glob("*"))))
    for path in told:
        target = kept / path.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _finished(simulation: Simulation, rounds: int) -> bool:
    states = simulation.states()
    return all(
        site in states and states[site].info.get("final") and states[site].info.get("round") == rounds
        for site in simulation.sites
    )
