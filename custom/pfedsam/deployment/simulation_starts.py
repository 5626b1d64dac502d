"""What a simulation keeps between its starts, and what it goes on from: NVFlare's simulator empties its workspace.

What decides the result is kept in the run folder, see `pfedsam.deployment.run_terms`: a run only goes on, and only
answers, where that is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_terms import job_terms
from pfedsam.deployment.run_terms import kept_terms, require_same, terms_of, with_data
from pfedsam.deployment.simulation import Simulation
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.records import RECEIVED_FILE, ROUNDS_FILE
from pfedsam.files import write_atomically
from pfedsam.storage.global_model import round_of
from pfedsam.storage.run_folder import EARLIER, RUN, SENT_FILE, global_models
from pfedsam.storage.site_model import read
from pfedsam.storage.state_files import CURRENT, PREVIOUS
from pfedsam.storage.state_list import StateEntry

_ANOTHER = "Give another --out, or --fresh, which moves the old run aside."


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
    models = [path for path in (simulation.global_model, newest_global_model(simulation)) if path.exists()]
    if not models and not simulation.states():
        return content  # nothing has come of what was begun here
    require_same(f"the run in {simulation.out}", kept, content["terms"] if data else terms, _ANOTHER)
    done = max([round_of(path) + 1 for path in models], default=0)
    if done > simulation.rounds_in_all:
        message = f"the run in {simulation.out} has done {done} rounds, {simulation.rounds_in_all} are asked for."
        raise PFedSAMError(ErrorCode.OTHER_RUN, message, _ANOTHER)
    return content


def newest_global_model(simulation: Simulation) -> Path:
    """Where the simulator writes the global model of each round."""
    return global_models(simulation.out)[1]


def keep_global_model(simulation: Simulation) -> None:
    """Keep the last global model before the simulator empties its workspace."""
    newest, kept = newest_global_model(simulation), simulation.global_model
    if newest.exists() and (not kept.exists() or round_of(newest) > round_of(kept)):
        write_atomically(kept, newest.read_bytes())


def keep_start(simulation: Simulation) -> None:
    """Keep what a start tells of its rounds, curves and what was sent, before the simulator empties its workspace."""
    workspace, earlier = simulation.workspace, simulation.out / EARLIER
    of_server = [
        path
        for name in (ROUNDS_FILE, RECEIVED_FILE, "tb_events/*/*")
        for path in workspace.glob(f"server/{RUN}/{name}")
    ]
    files = [*workspace.glob(f"*/{RUN}/{SENT_FILE}"), *of_server]
    if not files:
        return
    kept = earlier / str(len(list(earlier.glob("*"))))
    for path in files:
        target = kept / path.relative_to(workspace)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def put_states_back(simulation: Simulation, done: int) -> None:
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
            message = f"{site} in {simulation.out} has kept no state of round {done - 1}, with which the run goes on."
            raise PFedSAMError(ErrorCode.OTHER_RUN, message, _ANOTHER)


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


def is_finished(simulation: Simulation, rounds: int) -> bool:
    """Whether every site has done its final phase after so many rounds."""
    states = simulation.states()
    return all(
        site in states and states[site].info.get("final") and states[site].info.get("round") == rounds
        for site in simulation.sites
    )
