"""A federation on one machine: which sites and which job, how many rounds, and where its run folder keeps what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfedsam import defaults
from pfedsam.bundles import settings_of
from pfedsam.comparison.expected import rounds_done, simulated_events
from pfedsam.data.site_folder import site_names
from pfedsam.data.sites import read_split
from pfedsam.deployment.job_files import find_job, plan_settings, server_settings
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.global_model import round_of
from pfedsam.storage.run_folder import RUN, SENT_FILE, WORKSPACE, bytes_by_round, global_models, starts
from pfedsam.storage.state_list import StateEntry, newest_states
from pfedsam.training.strategy import Strategy


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
    job: str = defaults.STRATEGY
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
        return global_models(self.out)[0]

    def states(self) -> dict[str, StateEntry]:
        """The newest state of each site in this federation."""
        return newest_states(self.state_root, self.federation)


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
    """How many events `pfedsam.deployment.simulator.run` tells, or of a run that was stopped will still tell."""
    strategy = Strategy.of(simulation.plan["strategy"])
    done = rounds_done(simulation.out)
    return simulated_events(strategy, len(simulation.sites), simulation.rounds_in_all, done)


def sent_bytes(simulation: Simulation) -> dict[str, dict[int, int]]:
    """Bytes of tensors that left each site, by round, as its own filter recorded them."""
    workspaces = starts(simulation.out)
    return {
        site: bytes_by_round(workspace / site / RUN / SENT_FILE for workspace in workspaces)
        for site in simulation.sites
    }
