"""`pfedsam simulate` and `demo`: a federation on this machine."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import (
    Force,
    Fresh,
    Job,
    Overrides,
    RunFolder,
    bar,
    claim_folder,
    console,
    literals,
    show_doubts,
)
from pfedsam.commands.data import make_phantom
from pfedsam.commands.evaluation import report, show_evaluation
from pfedsam.commands.interrupts import command_again, ends_in_order
from pfedsam.commands.listing import TRAIN
from pfedsam.commands.live import Following, Live, following
from pfedsam.deployment.simulator_process import begun
from pfedsam.ranges import LARGEST_SEED, MOST_ROUNDS
from pfedsam.storage.progress import Progress
from pfedsam.storage.run_folder import RUN, is_simulation, starts

app = typer.Typer()

#: The demo is as small as it can be and still show the effect in minutes on two cores.
DEMO_JOB = defaults.STRATEGY
DEMO_CASES = 9
DEMO_SHAPE = (96, 96, 8)
DEMO_ROUNDS = 3
DEMO_SIDE = 80
DEMO_OVERRIDES: dict[str, Any] = {
    "adapted_blocks": 1,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 3,
    "negatives_per_case": 1,
    "cache_limit_gb": 1,
}

#: A site's line of progress before it trains in a round; the number of rounds that the global model has seen.
_GLOBAL_DICE = re.compile(r"round (\d+): global Dice (\d\.\d+)")


@app.command(rich_help_panel=TRAIN)
def simulate(
    data: Annotated[Path, typer.Argument(help="Folder that holds the site folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; a run that was stopped goes on in it. By default runs/simulation-<time>."),
    ] = None,
    job: Job = defaults.STRATEGY,
    strategy: Annotated[
        str | None, typer.Option(help="Strategy, ablation or .json file, not the job's (`pfedsam compare --list`).")
    ] = None,
    federation: Annotated[str, typer.Option(help="Name of the federation: the state of the sites is keyed by it.")] = (
        "simulation"
    ),
    bundle: Annotated[str | None, typer.Option(help="Name of an installed bundle; by default the job's.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROUNDS, help="Rounds in all; by default the job's.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the draws, and the test fold: seed modulo `folds`.")
    ] = 0,
    validate_every: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROUNDS, help="Validate every so many rounds only.")
    ] = None,
    live: Live = False,
    fresh: Fresh = False,
    force: Force = False,
    set_: Overrides = None,
) -> None:
    """Simulate a federation of the site folders in DATA with NVFlare, and show what each site gained.

    In a folder that holds a run, it goes on with that run, or evaluates it again, if all that decides the result is the
    same; else it says what differs, and stops.
    """
    overrides = {"seed": seed, **literals(set_ or [])}
    out = out or Path(f"runs/simulation-{time.strftime('%Y%m%d-%H%M%S')}")
    with ends_in_order(f"To go on: {command_again(out)}"), begun() as process:  # it imports meanwhile
        from pfedsam.api import planned_simulation
        from pfedsam.deployment.simulation import require_splits
        from pfedsam.training.catalogue import find_strategy

        if strategy is not None and find_strategy(strategy).kind != "federated":
            raise typer.BadParameter(f"'{strategy}' needs no server: use `pfedsam compare`", param_hint="--strategy")
        planned = planned_simulation(data, out, job, strategy, federation, bundle, rounds, overrides, validate_every)
        with planned as simulation:
            require_splits(simulation)
            claim_folder(out, "simulation", is_simulation, force)
            federate(simulation, process, fresh, live)


@app.command(rich_help_panel=TRAIN)
def demo(
    out: RunFolder = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of phantom, draws and split.")] = 0,
    image_size: Annotated[
        int, typer.Option(help="Side of the network's input in pixels; 64 is faster, 128 better.")
    ] = DEMO_SIDE,
    amp: Annotated[
        bool | None, typer.Option(help="bfloat16 autocast; by default where the processor or GPU has bfloat16.")
    ] = None,
    fresh: Fresh = False,
    force: Force = False,
) -> None:
    """The main job on a phantom federation of 4 sites: some minutes on a laptop, no data and no GPU needed."""
    from pfedsam.bundles import require_settings

    require_settings(defaults.BUNDLE, {"image_size": image_size, **DEMO_OVERRIDES})
    with ends_in_order(f"To go on: {command_again()} (or `make demo` again); what is done is kept."):
        claim_folder(out, "demo", is_simulation, force)
        with begun() as process:  # it imports meanwhile
            _demo(process, out, seed, image_size, amp, fresh)
    console.print("Next, with data of your own, one folder for each site, <data>/<site>/images and labels:")
    console.print("  pfedsam validate <data>/<site>\n  pfedsam simulate <data> --out runs/mine")


def _demo(process: Any, out: Path, seed: int, image_size: int, amp: bool | None, fresh: bool) -> None:
    from pfedsam.deployment.simulation import Simulation
    from pfedsam.deployment.simulation_starts import require_same_run

    data = out / "phantom"
    with console.status("loading libraries"):
        from pfedsam.training.precision import bfloat16_pays
    reduced = bfloat16_pays() if amp is None else amp
    overrides = {"seed": seed, "image_size": image_size, "amp": reduced, **DEMO_OVERRIDES}
    simulation = Simulation(data, out, DEMO_JOB, "phantom-demo", None, DEMO_ROUNDS, overrides)
    if not fresh:
        require_same_run(simulation, data=False)  # before the phantom of another seed replaces its data
    make_phantom(data, 4, DEMO_CASES, DEMO_SHAPE, seed, force=True)
    federate(simulation, process, fresh)


def federate(simulation: Any, process: Any, fresh: bool = False, live: bool = False) -> None:
    """Run a simulation, or what is left of it, with progress, then show what each site gained.

    Args:
        simulation: a `pfedsam.deployment.simulation.Simulation`.
        process: of `pfedsam.deployment.simulator_process.begun`.
        fresh: move a run that is in its folder aside first.
        live: keep a page that follows it.
    """
    with console.status("loading libraries"):
        from pfedsam.deployment.simulation import expected_events, sent_bytes
        from pfedsam.deployment.simulation_starts import is_finished, require_same_run
        from pfedsam.deployment.simulator import begin_anew
        from pfedsam.training.strategy import Strategy

    out: Path = simulation.out
    if fresh and (aside := begin_anew(simulation)):
        console.print(f"the run that was here is now in {aside}", highlight=False, soft_wrap=True)
    with console.status("reading settings and data"):
        require_same_run(simulation)
    rounds, again = simulation.rounds_in_all, command_again(out)
    console.print(
        f"{len(simulation.sites)} sites, {rounds} rounds, then the final personal phase; log: {out}/simulator.log"
    )
    console.print(f"if it is stopped, it goes on with: {again}", highlight=False, soft_wrap=True)
    strategy = Strategy.of(simulation.plan["strategy"]).name
    name = f"{simulation.federation}: {strategy} on {simulation.data.resolve().name}"
    progress = Progress("simulation", name, again, simulation.sites, rounds)
    progress.total = 0 if is_finished(simulation, rounds) else expected_events(simulation)
    with following(out, progress, live) as follow:
        _train(simulation, process, follow)
        show_doubts(start / "server" / RUN for start in starts(out))
        follow(progress.done, "testing the models")
        states = simulation.states()
        models = {site: (simulation.data / site, states[site].file) for site in simulation.sites}
        show_evaluation(models, simulation.plan["bundle"], simulation.settings, out, sent_bytes(simulation))
        report(out)
    console.print(f"personal state: {simulation.state_root} (pfedsam state list --root {simulation.state_root})")


def _train(simulation: Any, process: Any, follow: Following) -> None:
    from pfedsam.deployment.simulator import run

    done, tell = 0, _RoundByRound(len(simulation.sites))
    with bar("starting", follow.progress.total) as advance:

        def event(line: str) -> None:
            nonlocal done
            done += 1
            advance(done, line)
            follow(done, line)
            tell(line)

        if not run(simulation, event, process):
            console.print("this federation has finished before; its sites are evaluated again")


class _RoundByRound:
    """Prints how good the global model is, once all sites have told it in a round."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._told: defaultdict[int, list[float]] = defaultdict(list)

    def __call__(self, line: str) -> None:
        """Take a line of `pfedsam.deployment.simulator.run`."""
        if not (found := _GLOBAL_DICE.match(line)):
            return
        rounds, told = int(found[1]), self._told[int(found[1])]
        told.append(float(found[2]))
        if len(told) == self._sites:
            when = f"after {rounds} round{'s' * (rounds > 1)}" if rounds else "before the first round"
            mean = sum(told) / len(told)
            console.print(f"{when}: global Dice {mean:.3f}, mean of the sites' validation cases", highlight=False)
