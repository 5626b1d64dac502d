"""Runs of several sites: a simulated federation, and a comparison of strategies."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedsam import defaults
from pfedsam.api.training import Event
from pfedsam.errors import ErrorCode, PFedSAMError

if TYPE_CHECKING:
    import pandas as pd

    from pfedsam.deployment.simulation import Simulation


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """What a simulated federation gave.

    Attributes:
        out: the run folder.
        global_model: file of the last global model.
        states: model file of each site.
        results: the numbers as JSON, which `pfedsam report` shows.
        dice: one row for each site, by name: `cases`, mean Dice `global` and `personal` over its test cases, `gain`.
        cases: one row for each case, model and class, see `evaluate`.
    """

    out: Path
    global_model: Path
    states: dict[str, Path]
    results: Path
    dice: pd.DataFrame = field(repr=False)
    cases: pd.DataFrame = field(repr=False)


def simulate(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    bundle: str | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
    job: str = defaults.STRATEGY,
    federation: str = "simulation",
    fresh: bool = False,
    force: bool = False,
    event: Event | None = None,
) -> SimulationResult:
    """Simulate a federation with NVFlare on this machine, then evaluate both models of every site.

    In a folder that holds a run it goes on with that run, or evaluates it again, if all that decides the result is the
    same. It starts processes of its own, which end with this one.

    Args:
        data: folder that holds the site folders.
        out: run folder; by default `runs/simulation-<time>`.
        bundle: name of an installed bundle; by default the job's.
        strategy: name or `.json` file of a federated strategy; by default the job's.
        rounds: rounds in all; by default the job's.
        seed: of the draws; the test fold is `seed` modulo `folds`.
        settings: overrides of the bundle, see `pfedsam settings`.
        validate_every: validate the global model every so many rounds; by default the job's.
        job: name of a packaged job, or a job folder.
        federation: name of the federation: the states of the sites are keyed by it.
        fresh: move a run that is in `out` aside first.
        force: write into a folder that is not ours.
        event: called with a line for each thing that one waits for.

    Raises:
        PFedSAMError: E02 if there are fewer than two sites, E06 if one cannot be split, E14 if another process works in
            `out`, E18, E28 or E32 for wrong settings or names, E24 if `out` is not ours, E25 if it holds another run;
            else of the first site that failed.

    Example:
        >>> found = pfedsam.simulate("data", "runs/mine", rounds=6)  # doctest: +SKIP
        >>> found.dice.gain.min()  # doctest: +SKIP
    """
    from pfedsam.deployment.simulation import require_splits
    from pfedsam.deployment.simulator import begin_anew, run
    from pfedsam.storage.run_folder import claim_run, is_simulation

    out = Path(out or f"runs/simulation-{time.strftime('%Y%m%d-%H%M%S')}")
    overrides = {"seed": seed, **(settings or {})}
    with planned_simulation(
        Path(data), out, job, strategy, federation, bundle, rounds, overrides, validate_every
    ) as simulation:
        require_splits(simulation)
        claim_run(out, "simulation", is_simulation, force)
        if fresh:
            begin_anew(simulation)
        run(simulation, event)
        return _result(simulation)


@contextmanager
def planned_simulation(
    data: Path,
    out: Path,
    job: str = defaults.STRATEGY,
    strategy: str | None = None,
    federation: str = "simulation",
    bundle: str | None = None,
    rounds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    validate_every: int | None = None,
) -> Iterator[Simulation]:
    """A simulation whose settings are checked, and whose job lasts as long as the block; see `simulate`.

    Raises:
        PFedSAMError: E18 or E28 for wrong settings or names, E32 for a strategy that needs no server.
    """
    from pfedsam.bundles import require_settings
    from pfedsam.deployment.job_files import find_job, plan_settings
    from pfedsam.deployment.jobs import make_job
    from pfedsam.deployment.simulation import Simulation
    from pfedsam.training.catalogue import find_strategy

    plan = plan_settings(find_job(job))
    brought = (plan.get("overrides") or {}) if strategy is None else find_strategy(strategy).overrides
    require_settings(bundle or plan["bundle"], {**brought, **(overrides or {})})
    every = {} if validate_every is None else {"validate_every": validate_every}
    with tempfile.TemporaryDirectory() as scratch:
        # not in the run folder: it may be another run's
        made = str(make_job(strategy, Path(scratch) / "job", job)) if strategy else job
        yield Simulation(data, out, made, federation, bundle, rounds, dict(overrides or {}), every)


def compare(
    data: str | os.PathLike[str],
    strategies: Sequence[str] = defaults.STRATEGIES,
    seeds: Sequence[int] = (0,),
    *,
    out: str | os.PathLike[str] = "runs/compare",
    bundle: str = defaults.BUNDLE,
    rounds: int = 6,
    settings: Mapping[str, Any] | None = None,
    validate_every: int = 3,
    unseen: bool = False,
    nvflare: bool = False,
    aggregation: str | None = None,
    workers: int = 0,
    records: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    force: bool = False,
    event: Event | None = None,
) -> pd.DataFrame:
    """Compare strategies on the same sites, splits and budget. What has a record is not run again.

    Every run is a process of its own, so a script that calls it needs `if __name__ == "__main__":`.

    Args:
        data: folder that holds the site folders; `{seed}` in it stands for the seed.
        strategies: names of strategies or ablations, or `.json` files.
        seeds: of splits and draws; the test fold is the seed modulo `folds`.
        out: folder of trainings and records.
        bundle: name of an installed bundle.
        rounds: of every federation.
        settings: overrides of the bundle, see `pfedsam settings`; those of a strategy come before them.
        validate_every: validate the global model every so many rounds.
        unseen: leave one site out in turn, as a new hospital.
        nvflare: train with NVFlare's simulator what needs a server.
        aggregation: rule of the server for strategies that name none.
        workers: runs at a time, one thread each; 0: one a core.
        records: file of the records; by default `<out>/runs.jsonl`.
        fresh: run again what has a record of other data, weights or bundle than there are now.
        force: write into a folder that is not ours.
        event: called with a line for each thing that one waits for.

    Returns:
        One row for each case, model and run: `strategy`, `seed`, `held_out`, `site`, `case`, `patient` (hashes),
        `model`, `dice`, `hd95`, `asd` (mm), `nsd`, `failed`; the classes' mean.

    Raises:
        PFedSAMError: E02 if there is no site; E16, E18, E28 or E32 for wrong settings or names; E24 for an `out` that
            is not ours; E25 if records are of something else than there is now; else, after all runs, the code of the
            first that failed. What is done is kept: the next call goes on.

    Example:
        >>> rows = pfedsam.compare("data", ["local_only", "pfedsam"], seeds=[0, 1, 2])  # doctest: +SKIP
        >>> rows[rows.model == "personal"].groupby("strategy").dice.mean()  # doctest: +SKIP
    """
    from pfedsam.comparison.compare import Comparison
    from pfedsam.comparison.compare import compare as run_all
    from pfedsam.comparison.planned import planned_runs
    from pfedsam.comparison.records import problem_of_record
    from pfedsam.comparison.statistics import case_table
    from pfedsam.storage.run_folder import claim_run, is_comparison

    out, tell = Path(out), event or (lambda line: None)
    more = {"validate_every": validate_every, "simulator": nvflare, "aggregation": aggregation}
    runs = planned_runs(Path(data), strategies, seeds, rounds, bundle, settings or {}, unseen, **more)
    comparison = Comparison(runs, out, None if records is None else Path(records), fresh=fresh)
    if nvflare:
        from pfedsam.deployment.nvflare_runner import run_simulated

        comparison.simulator = run_simulated
    if not fresh and (outdated := comparison.outdated()):
        differences = "; ".join(f"other {what} for {', '.join(names)}" for what, names in outdated.items())
        raise PFedSAMError(
            ErrorCode.OTHER_RUN,
            f"{comparison.record_file} does not tell of what is here now: {differences}.",
            "fresh=True runs them again, another `records` keeps both.",
        )
    claim_run(out, "comparison", is_comparison, force)
    run_all(comparison, workers or os.cpu_count() or 1, lambda line, count: tell(line))
    if comparison.failed:
        raise _failure(comparison.failed, len(runs))
    return case_table([record for record in comparison.records() if not problem_of_record(record)])


def _result(simulation: Simulation) -> SimulationResult:
    """Evaluate the sites of a run, write `results.json`, and tell where all is."""
    import pandas as pd

    from pfedsam.deployment.simulation import sent_bytes
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.evaluation.tables import RESULTS_FILE, case_rows, write_results

    out, bundle, overrides = simulation.out, simulation.plan["bundle"], simulation.settings
    states = {site: entry.file for site, entry in sorted(simulation.states().items())}
    evaluations = [
        evaluate_site(bundle, simulation.data / site, file, overrides=overrides, site=site, output_dir=out)
        for site, file in states.items()
    ]
    table, file = write_results(evaluations, sent_bytes(simulation), out, bundle, overrides), out / RESULTS_FILE
    rows = {
        site: {"cases": row["cases"], "global": row["dice_global"], "personal": row["dice_personal"]}
        for site, row in table["sites"].items()
    }
    dice = pd.DataFrame.from_dict(rows, orient="index").assign(gain=lambda frame: frame["personal"] - frame["global"])
    cases = case_rows(evaluations, bundle)
    return SimulationResult(out, simulation.global_model, states, file, dice.rename_axis("site"), cases)


def _failure(failed: Mapping[str, str], runs: int) -> PFedSAMError:
    """One error for the runs that failed, with the code of the first."""
    first = next(iter(failed.values())).partition(":")[0]
    code = ErrorCode(first) if first in {member.value for member in ErrorCode} else ErrorCode.UNEXPECTED
    problems = "; ".join(f"{name}: {problem}" for name, problem in failed.items())
    return PFedSAMError(code, f"{len(failed)} of {runs} runs failed: {problems}", "The others are kept: call it again.")
