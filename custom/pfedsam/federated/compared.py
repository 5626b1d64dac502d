"""A run of a comparison through NVFlare's simulator instead of in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.runs import Run
from pfedsam.federated.simulation import Simulation, sent_bytes
from pfedsam.federated.simulation import run as simulate

FEDERATION = "comparison"


def run_simulated(run: Run, out: Path, tell: Callable[[str], None]) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Train a run with real NVFlare processes.

    Args:
        run: its strategy must have a job of the same name.
        out: folder of the training.
        tell: called with a line for each validation and phase.

    Returns:
        The model file of each site; a note for each round and site with the bytes that its filter let out.

    Raises:
        PFedSAMError: E16 for a strategy without a server or a run with an unseen site; else of the first failing site.
    """
    if run.file.kind != "federated" or run.held_out:
        raise PFedSAMError("E16", f"'{run.name}' has no NVFlare job.", "Run it without --nvflare: it needs no server.")
    strategy = {"validate_every": run.validate_every}
    simulation = Simulation(
        Path(run.data), out, run.strategy, FEDERATION, run.bundle, run.rounds, run.settings, strategy, run.sites
    )
    simulate(simulation, tell)
    notes = [
        {"round": number, "site": site, "bytes": count, "phases": {}, "gates": {}}
        for site, rounds in sent_bytes(simulation).items()
        for number, count in enumerate(rounds)
    ]
    return {site: entry.file for site, entry in simulation.states().items()}, notes
