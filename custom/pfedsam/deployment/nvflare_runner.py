"""A run of a comparison through NVFlare's simulator instead of in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfedsam.comparison.run import Run
from pfedsam.deployment.jobs import make_job
from pfedsam.deployment.simulation import Simulation, sent_bytes
from pfedsam.deployment.simulator import run as simulate

FEDERATION = "comparison"


def run_simulated(run: Run, out: Path, tell: Callable[[str], None]) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Train a run with real NVFlare processes.

    Args:
        run: of any strategy, ablation or strategy file that needs a server; its job is made from it.
        out: folder of the training.
        tell: called with a line for each validation and phase.

    Returns:
        The model file of each site; a note for each round and site with the bytes that its filter let out. What the
        phases did stays at the sites: `phases` is None.

    Raises:
        PFedSAMError: E32 for a strategy without a server; else of the first failing site.
    """
    job = make_job(run.strategy, out / "template", force=True)
    strategy = {"validate_every": run.validate_every, "aggregation": run.file.checked().aggregation}
    simulation = Simulation(
        Path(run.data), out, str(job), FEDERATION, run.bundle, run.rounds, run.settings, strategy, run.sites
    )
    simulate(simulation, tell)
    notes: list[dict[str, Any]] = [
        {"round": number, "site": site, "bytes": count, "phases": None, "gates": {}}
        for site, rounds in sent_bytes(simulation).items()
        for number, count in rounds.items()
    ]
    return {site: entry.file for site, entry in simulation.states().items()}, notes
