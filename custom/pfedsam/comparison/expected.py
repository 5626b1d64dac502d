"""How many events a comparison will tell: rounds that several strategies share are told once, and counted once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pfedsam.comparison.run import Run
from pfedsam.comparison.unseen import case_counts
from pfedsam.storage.global_model import round_of
from pfedsam.storage.run_folder import global_models
from pfedsam.training.federation import Federation
from pfedsam.training.strategy import Strategy


class Expected:
    """The events that runs have not told yet, by the training that they belong to.

    Attributes:
        total: number of events at the start.
    """

    def __init__(self, runs: Iterable[Run], out: Path) -> None:
        self._of_run = {run.key(): events_left(run, out) for run in runs}
        self._left = {place: count for events in self._of_run.values() for place, count in events.items()}
        self.total = sum(self._left.values())

    def told(self, run: Run) -> int:
        """Take the next event of a run; 0 if none was expected: it repeats what a run that failed had told."""
        for place in self._of_run.get(run.key(), ()):
            if self._left[place]:
                self._left[place] -= 1
                return 1
        return 0

    def ended(self, run: Run, done: bool) -> int:
        """Take what a run that has ended will not tell any more.

        Args:
            run: the run.
            done: False if it failed: another run will do what both share.
        """
        places = self._of_run.pop(run.key(), {})
        kept = set() if done else {place for events in self._of_run.values() for place in events}
        count = 0
        for place in set(places) - kept:
            count += self._left[place]
            self._left[place] = 0
        return count


def events_left(run: Run, out: Path) -> dict[str, int]:
    """Number of events that `pfedsam.comparison.execute.execute` tells, in its order; what is done is not told again.

    Args:
        run: a run of a comparison.
        out: the comparison's folder.

    Returns:
        Events by the folder of the training: runs that share a training share its events. The tests are the run's own.
    """
    if run.simulated:
        folder = run.training_folder(out)
        strategy = run.file.checked().model_copy(update={"validate_every": run.validate_every})
        trained = {str(folder): simulated_events(strategy, len(run.sites), run.rounds, rounds_done(folder))}
        return {**trained, run.key(): len(run.sites)}
    federation = run.federation(out)
    if run.held_out is None:
        return {**_training(federation), run.key(): len(run.sites)}
    counts = case_counts(len(run.splits()[run.held_out]["training"]))
    if run.file.kind == "local":
        folder, site = run.folders()[run.held_out], {run.held_out: run.folders()[run.held_out]}
        alone = [replace(federation, sites=site, out=federation.out / f"alone-{cases}") for cases in counts]
        trained = {place: count for one in alone for place, count in _training(one).items()}
        return {**trained, run.key(): len(counts)}
    fitted = len(counts) if run.file.kind == "federated" and federation.strategy.final else 0
    return {**_training(federation), run.key(): 1 + fitted}


def simulated_events(strategy: Strategy, sites: int, rounds: int, done: int) -> int:
    """Number of events of a simulation: of each site its validations, its phases, and the end of its final phase.

    Args:
        strategy: with `validate_every`.
        sites: number of sites.
        rounds: in all.
        done: rounds behind the global model that it goes on from.
    """
    validated = sum((number + 1) % strategy.validate_every == 0 for number in range(done, rounds))
    left = max(0, rounds - done) * len(strategy.phases)
    return sites * (validated + left + len(strategy.final_epochs) + 1)


def rounds_done(out: Path) -> int:
    """Rounds behind the newest global model in the folder of a simulation, also one that nobody has kept yet."""
    return max((round_of(path) + 1 for path in global_models(out) if path.exists()), default=0)


def _training(federation: Federation) -> dict[str, int]:
    """As `run_federation` tells them."""
    if federation.finished():
        return {}
    shared = federation.shared_rounds
    before = _training(shared) if shared else {}
    rounds = 0 if shared else federation.rounds - federation.global_model()[1]
    finals = sum(not replace(federation, sites={name: path}).finished() for name, path in federation.sites.items())
    return {**before, str(federation.out): rounds * len(federation.sites) + finals}
