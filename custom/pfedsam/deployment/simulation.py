"""A federation on one machine: NVFlare's simulator on a folder of site folders, resumable, then the evaluation.

What decides the result is kept in the run folder, see `pfedsam.deployment.run_terms`: a run only goes on, and only
answers, where that is the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pfedsam.bundles import settings_of
from pfedsam.children import end, supervised
from pfedsam.data.sites import read_split, site_names
from pfedsam.deployment.job_terms import job_terms
from pfedsam.deployment.jobs import export_job, find_job, plan_settings, server_settings
from pfedsam.deployment.run_terms import keep_terms, kept_terms, require_same, terms_of, with_data
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.records import PROGRESS_LINE, RECEIVED_FILE, ROUNDS_FILE
from pfedsam.files import write_atomically
from pfedsam.storage.global_model import round_of
from pfedsam.storage.run_folder import EARLIER, RUN, SENT_FILE, WORKSPACE, bytes_by_round, move_aside, starts
from pfedsam.storage.site_model import read
from pfedsam.storage.state import CURRENT, PREVIOUS, ROOT_VARIABLE, StateEntry, newest_states

_PROBLEM = re.compile(r"\b(E\d\d): (.*)")
_ANOTHER = "Give another --out, or --fresh, which moves the old run aside."


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
                ErrorCode.SITE_FOLDER,
                f"{self.data} holds {len(names)} site folder(s), at least 2 are needed.",
                "Lay it out as <data>/<site>/images and <data>/<site>/labels, or make one with `pfedsam phantom`.",
            )
        return names

    @property
    def workspace(self) -> Path:
        """NVFlare's workspace; the simulator empties it at the start."""
        return self.out / WORKSPACE

    @property
    def plan(self) -> dict[str, Any]:
        """The job's plan with what replaces its own."""
        plan = plan_settings(find_job(self.job))
        return {
            "federation": self.federation,
            "bundle": self.bundle or plan["bundle"],
            "overrides": {**(plan.get("overrides") or {}), **self.overrides},
            "strategy": {**plan["strategy"], **self.strategy},
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All overrides of the bundle: the job's own, and `overrides` on top."""
        return self.plan["overrides"]

    @property
    def rounds_in_all(self) -> int:
        """Rounds of the federation: `rounds`, or the job's own."""
        return self.rounds or int(server_settings(find_job(self.job))["num_rounds"])

    @property
    def rounds_done(self) -> int:
        """Rounds behind the last global model that is kept."""
        return round_of(self.global_model) + 1 if self.global_model.exists() else 0

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


def require_same_run(simulation: Simulation, data: bool = True) -> dict[str, Any]:
    """Make sure that what is in the run folder is a part of this very run, or nothing.

    Args:
        simulation: what is to be run.
        data: False to compare the settings only, before the data are there.

    Returns:
        What is to be kept with the run, see `pfedsam.deployment.run_terms`; the terms alone without `data`.

    Raises:
        PFedSAMError: E25 if it is another run, E02 to E09 as `read_split`, E16 or E18 for wrong settings.
    """
    kept = kept_terms(simulation.out)
    terms = terms_of(simulation.plan, job_terms(find_job(simulation.job)))
    content = with_data(terms, {site: simulation.data / site for site in simulation.sites}, kept) if data else terms
    models = [path for path in (simulation.global_model, _newest_global_model(simulation)) if path.exists()]
    if not models and not simulation.states():
        return content  # nothing has come of what was begun here
    require_same(f"the run in {simulation.out}", kept, content["terms"] if data else terms, _ANOTHER)
    done = max([round_of(path) + 1 for path in models], default=0)
    if done > simulation.rounds_in_all:
        told = f"the run in {simulation.out} has done {done} rounds, {simulation.rounds_in_all} are asked for."
        raise PFedSAMError(ErrorCode.OTHER_RUN, told, _ANOTHER)
    return content


def run(simulation: Simulation, event: Callable[[str], None] | None = None) -> bool:
    """Run the federation, or what is left of it.

    Args:
        simulation: what to run.
        event: called with a line for each thing that a person waits for (a validation, a phase).

    Returns:
        False if everything was done before.

    Raises:
        PFedSAMError: E25 if the folder holds another run, E14 if another process works in it; else with the code and
            line of the first site that failed.
    """
    with _alone(simulation.out):
        return _run(simulation, event)


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
        told = f"another simulation runs in {out}."
        raise PFedSAMError(ErrorCode.STATE_IN_USE, told, "Wait for it, or give another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _run(simulation: Simulation, event: Callable[[str], None] | None) -> bool:
    keep_terms(simulation.out, require_same_run(simulation))
    rounds = simulation.rounds_in_all
    _harvest(simulation)
    done = simulation.rounds_done
    if done >= rounds and _finished(simulation, rounds):
        return False
    _keep_start(simulation)
    _put_states_back(simulation, done)
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
    _simulate(simulation, job, log, event)
    _harvest(simulation)
    if not _finished(simulation, rounds):
        raise _first_problem(simulation) or PFedSAMError(
            ErrorCode.UNEXPECTED, f"the simulation did not finish, see {log}.", "Start it again to go on."
        )
    return True


def require_splits(simulation: Simulation) -> None:
    """Make sure that every site can be split, before anything is written.

    Raises:
        PFedSAMError: E02 if there are too few sites; E06 naming all sites with too few patients for a split of their
            own; else what is wrong in the first site.
    """
    settings = settings_of(simulation.plan["bundle"], simulation.settings)
    small = []
    for site in simulation.sites:
        try:
            read_split(simulation.data / site, int(settings["seed"]), int(settings["folds"]))
        except PFedSAMError as error:
            if error.code != ErrorCode.TOO_FEW_CASES:
                raise
            small.append(f"{site}: {error.message}")
    if small:
        raise PFedSAMError(
            ErrorCode.TOO_FEW_CASES,
            " ".join(small),
            f"Write an even split for all sites: pfedsam split {simulation.data}",
        )


def expected_events(simulation: Simulation) -> int:
    """How many events `run` reports for a whole run."""
    strategy = simulation.plan["strategy"]
    a_round = 1 + len(strategy["phases"])
    left = max(0, simulation.rounds_in_all - simulation.rounds_done)
    return len(simulation.sites) * (left * a_round + len(strategy.get("final", ())) + 1)


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
        # a session of its own: Ctrl-C in the terminal is for us, who then end it with all that it has started
        subprocess.Popen(
            supervised(command),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if event and (news := PROGRESS_LINE.search(line)):
                    event(news.group(1).strip())
        except BaseException:
            end(process)
            raise


def _first_problem(simulation: Simulation) -> PFedSAMError | None:
    """The first error of ours in the logs of the sites and the server."""
    for name in (*simulation.sites, "server"):
        path = simulation.workspace / name / "error_log.txt"
        found = _PROBLEM.search(path.read_text(errors="replace")) if path.exists() else None
        if found:
            return PFedSAMError(found.group(1), f"{name}: {found.group(2)}", f"See {path}.")
    return None


def _newest_global_model(simulation: Simulation) -> Path:
    return simulation.workspace / "server" / RUN / "app_server" / "global_model.safetensors"


def _harvest(simulation: Simulation) -> None:
    """Keep the last global model before the simulator empties its workspace."""
    newest, kept = _newest_global_model(simulation), simulation.global_model
    if newest.exists() and (not kept.exists() or round_of(newest) > round_of(kept)):
        write_atomically(kept, newest.read_bytes())


def _keep_start(simulation: Simulation) -> None:
    """Keep what a start tells of its rounds, curves and what was sent, before the simulator empties its workspace."""
    workspace, earlier = simulation.workspace, simulation.out / EARLIER
    of_server = [
        path
        for name in (ROUNDS_FILE, RECEIVED_FILE, "tb_events/*/*")
        for path in workspace.glob(f"server/{RUN}/{name}")
    ]
    told = [*workspace.glob(f"*/{RUN}/{SENT_FILE}"), *of_server]
    if not told:
        return
    kept = earlier / str(len(list(earlier.glob("*"))))
    for path in told:
        target = kept / path.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _put_states_back(simulation: Simulation, done: int) -> None:
    """Give each site the state that it had after the last round that is in the global model.

    A site may be one step ahead: it has trained a round that the others have not, or fitted the final phase. Trained
    again from there, its personal part would be another than that of a run that was never stopped.

    Raises:
        PFedSAMError: E25 if a site has kept no such state.
    """
    states = simulation.states()
    for site in simulation.sites:
        entry = states.get(site)
        if entry and not done:  # of a first round that has no global model
            for name in (CURRENT, PREVIOUS):
                (entry.folder / name).unlink(missing_ok=True)
        elif done and not (entry and _takes_back(entry, done - 1)):
            told = f"{site} in {simulation.out} has kept no state of round {done - 1}, with which the run goes on."
            raise PFedSAMError(ErrorCode.OTHER_RUN, told, _ANOTHER)


def _takes_back(entry: StateEntry, number: int) -> bool:
    """Whether a site has the state of a round; if it is the one before the last, it is made the last."""
    if _is_of_round(entry.info, number):
        return True
    previous = entry.folder / PREVIOUS
    if not (previous.exists() and _is_of_round(read(previous).info, number)):
        return False
    write_atomically(entry.folder / CURRENT, previous.read_bytes())
    return True


def _is_of_round(info: Mapping[str, Any], number: int) -> bool:
    return info.get("round") == number and not info.get("final")


def _finished(simulation: Simulation, rounds: int) -> bool:
    states = simulation.states()
    return all(
        site in states and states[site].info.get("final") and states[site].info.get("round") == rounds
        for site in simulation.sites
    )
