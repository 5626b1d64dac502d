"""What the tests of this folder do with a deployment of real processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import Session

from pfedsam.deployment.admin import JobResult, connect, fetch, follow, submit
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.storage.job_plan import PLAN_FILE, SERVER
from pfedsam.storage.state_list import StateEntry, list_states
from pfedsam.training.catalogue import find_strategy

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
FEDERATION = "tests"
TINY: dict[str, Any] = {
    "backbone": "vit_test",
    "image_size": 64,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Federation:
    """A running deployment, and what the tests do with it."""

    deployment: Deployment
    data: dict[str, Path]
    session: Session
    folder: Path

    def job(
        self,
        name: str = "job",
        *,
        rounds: int = 2,
        min_clients: int = 2,
        privacy: Privacy | None = None,
        wait: float = 2,
        code: Sequence[Path] = (),
        **plan: Any,
    ) -> Path:
        """A locked job on tiny settings, or one that carries these files of code; personal states change in each round.

        After `min_clients` answers a round waits so many seconds for the others.
        """
        strategy = find_strategy("local_phase_each_round").strategy
        told = {"federation": FEDERATION, "overrides": TINY, "strategy": strategy, **plan}
        server = {"num_rounds": rounds, "min_clients": min_clients}
        server |= {"validation_timeout": 15, "final_phase_timeout": 20}
        how: dict[str, Any] = {"server": server, "privacy": privacy}
        job = export_job(find_job("pfedsam"), self.folder / name, locked=not code, force=True, **how)
        # by hand: a wrong plan is the sites' to refuse, too
        change_config(job, PLAN_FILE, lambda plan: plan.update(told))
        for file in code:
            shutil.copy(file, job / "app" / "custom")
        change_config(job, SERVER, lambda c: c["workflows"][0]["args"].update(wait_time_after_min_received=wait))
        return job

    def preflight(self, site: str) -> str:
        """What NVFlare says of a kit. Its check logs in as the site, so a site that runs is stopped for it."""
        self.deployment.kill(site, signal.SIGTERM)
        command = [sys.executable, "-m", "nvflare.cli", "preflight-check", "-p", str(self.deployment.kit(site))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        self.deployment.start([site], {OUTCOME_VARIABLE: "10"})
        self.deployment.wait(self.session)
        return done.stdout

    def run(self, job: Path, timeout: float = 180) -> JobResult:
        """Submit, wait, fetch."""
        job_id = submit(self.session, job)
        follow(self.session, job_id, timeout=timeout)
        return fetch(self.session, job_id, self.folder / "results")

    def start(self, job: Path, until: Callable[[str], bool]) -> str:
        """Submit and wait until a log says something; returns the job's id."""
        job_id = submit(self.session, job)
        wait_for(lambda: until(job_id), 120)
        return job_id

    def log_of(self, site: str, job_id: str) -> str:
        """A site's own log of a job."""
        path = self.deployment.kit(site) / job_id / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def states(self) -> Mapping[str, StateEntry]:
        """State of every site; reading it checks that it is whole."""
        found = {}
        for site in self.deployment.sites:
            for entry in list_states(self.deployment.state_root(site)):
                assert entry.site == site and not entry.problem, entry
                found[site] = entry
        return found


@contextmanager
def running(
    folder: Path,
    data: Sequence[Path],
    *,
    project: Path = PROJECT,
    port: int | None = None,
    client_port: int | None = None,
    byoc: bool = False,
) -> Iterator[Federation]:
    """A deployment of real processes with own port, HOME and states; stopped in the end.

    Args:
        folder: everything is written below it.
        data: a site folder for each site of the project.
        project: NVFlare project file.
        port: of the server; by default a free one.
        client_port: port at which hospital-b reaches the server, for a proxy between them.
        byoc: let jobs carry code.
    """
    port = port or free_port()
    deployment = Deployment(folder / "runtime", project, port)
    sites = dict(zip(deployment.sites, data, strict=True))
    deployment.provision()
    deployment.init(sites, {"federations": [FEDERATION]}, byoc=byoc)
    if client_port is not None:
        config = deployment.kit("hospital-b") / "startup" / "fed_client.json"
        config.write_text(config.read_text().replace(f"localhost:{port}", f"localhost:{client_port}"))
    try:
        deployment.start(environment={OUTCOME_VARIABLE: "10"})
        with connect(deployment.admin()) as session:
            deployment.wait(session)
            yield Federation(deployment, sites, session, folder)
    finally:
        assert deployment.stop() == []
        deployment.require_free_port()


def change_config(job: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a configuration file of an exported job."""
    path = job / "app" / "config" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.3)
