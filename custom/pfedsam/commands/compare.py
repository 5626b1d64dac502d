"""`pfedsam compare`: strategies against each other on the same sites, splits and budget."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import Bundle, Force, Overrides, bar, claim_folder, console, literals
from pfedsam.commands.interrupts import command_again, ends_in_order
from pfedsam.commands.listing import LOOK
from pfedsam.commands.live import Following, Live, following
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ranges import LARGEST_SEED, MOST_ROUNDS, MOST_WORKERS
from pfedsam.storage.progress import Progress
from pfedsam.storage.run_folder import is_comparison

app = typer.Typer()

#: What is another one now, by its name in `Comparison.outdated`.
OUTDATED = {
    "defaults": "defaults of the bundle than it has now",
    "bundle": "configuration of the bundle than it has now",
    "inputs": "images, labels or base weights than there are now",
}


DEFAULT = ",".join(defaults.STRATEGIES)


@app.command(rich_help_panel=LOOK)
def compare(
    data: Annotated[
        Path | None,
        typer.Argument(help="Folder that holds the site folders; `{seed}` in it stands for the seed."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of records and trainings; what is done in it is not repeated.")] = (
        Path("runs/compare")
    ),
    strategies: Annotated[str, typer.Option(help="Names or files, with commas; `all`; `ablations`.")] = DEFAULT,
    seeds: Annotated[str, typer.Option(help="With commas; the test fold is seed modulo `folds`.")] = "0",
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS, help="Of every federation.")] = 6,
    bundle: Bundle = defaults.BUNDLE,
    workers: Annotated[
        int, typer.Option(min=0, max=MOST_WORKERS, help="Runs at a time, one thread each; 0: one a core.")
    ] = 0,
    validate_every: Annotated[
        int, typer.Option(min=1, max=MOST_ROUNDS, help="Validate the global model every so many rounds.")
    ] = 3,
    unseen: Annotated[bool, typer.Option("--unseen", help="Leave one site out in turn, as a new hospital.")] = False,
    nvflare: Annotated[
        bool, typer.Option("--nvflare", help="Train with NVFlare's simulator what needs a server.")
    ] = False,
    aggregation: Annotated[
        str | None,
        typer.Option(help="Rule of the server for strategies that name none, for example mean; see jobs/README.md."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help=f"Strategy that the others are tested against; by default {defaults.STRATEGY}, or the last."),
    ] = None,
    records: Annotated[Path | None, typer.Option(help="File of the records; by default <out>/runs.jsonl.")] = None,
    table_only: Annotated[bool, typer.Option("--table", help="Run nothing, show the records that are there.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run again what has a record of other data, weights or bundle than now.")
    ] = False,
    force: Force = False,
    live: Live = False,
    list_: Annotated[bool, typer.Option("--list", help="List the strategies and ablations, and stop.")] = False,
    set_: Overrides = None,
) -> None:
    """Compare strategies on the sites in DATA: train, test once at the end, tables with intervals and tests.

    Every run is one JSON line in <out>/runs.jsonl. Stopped (also by force), it goes on where it was. Learning rates and
    epochs are in the strategies' files, so that every strategy gets the same passes over the images in a round. Records
    of other images, labels, base weights or another bundle than there are now are refused, or run again (--fresh).
    """
    from pfedsam.training.catalogue import ablation_names, find_strategy, strategy_name, strategy_names

    if list_:
        for name in (*strategy_names(), *ablation_names()):
            console.print(f"{name:24} {find_strategy(name).description}", highlight=False, soft_wrap=True)
        return
    if data is None:
        raise typer.BadParameter("say where the site folders are", param_hint="DATA")
    known = {"all": strategy_names(), "ablations": ["pfedsam", *ablation_names()]}
    names = [name for part in strategies.split(",") for name in known.get(part.strip(), [part.strip()])]
    overrides = literals(set_ or [])
    with console.status("loading libraries"):
        from pfedsam.comparison.compare import Comparison

        runs = _runs(data, names, seeds, rounds, bundle, validate_every, unseen, nvflare, aggregation, overrides)
        comparison = Comparison(runs, out, records, fresh=fresh)
        if nvflare:
            from pfedsam.deployment.nvflare_runner import run_simulated

            comparison.simulator = run_simulated
        outdated, missing = _outdated(comparison), comparison.missing()
    if outdated and not (fresh or table_only):
        message = f"{comparison.record_file} does not tell of what is here now: {'; '.join(outdated)}."
        remedy = "--fresh runs them again, another --records keeps both, --table shows the old ones."
        raise PFedSAMError(ErrorCode.OTHER_RUN, message, remedy)
    claim_folder(out, "comparison", is_comparison, force)
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} done before; records: {comparison.record_file}")
    if (missing or live) and not table_only:
        again = command_again(out, without=())
        progress = _progress(comparison, missing, f"comparison on {data.resolve().name}", again)
        with ends_in_order(f"To go on: {again}"), following(out, progress, live) as follow:
            _run(comparison, missing, workers or os.cpu_count() or 1, follow)
    given = [strategy_name(name) for name in names]
    usual = defaults.STRATEGY if defaults.STRATEGY in given else given[-1]
    show_comparison(comparison, strategy_name(reference) if reference else usual)
    for name, problem in comparison.failed.items():
        console.print(f"failed: {name}: {problem}", style="red", highlight=False)
    if comparison.failed or (outdated and table_only):
        raise typer.Exit(1)


def _run(comparison: Any, missing: list[Any], workers: int, follow: Following) -> None:
    from pfedsam.comparison.compare import compare as run_all

    progress = follow.progress
    with bar(f"{len(missing)} runs", progress.total) as advance:
        done = 0

        def event(line: str, count: int) -> None:
            nonlocal done
            done += count
            advance(done, line)
            progress.active = dict(comparison.running)
            progress.failed = {name: problem.partition(" ")[0] for name, problem in comparison.failed.items()}
            # the sentence about a failure may name cases
            follow(done, line.partition(": ")[0] if line.startswith("failed: ") else line)

        run_all(comparison, workers, event)


def _progress(comparison: Any, missing: list[Any], name: str, command: str) -> Progress:
    """What the page is told of the runs before they begin; see `pfedsam.report.live.comparison`."""
    from pfedsam.comparison.expected import Expected

    runs = [
        {
            "name": run.name,
            "kind": run.file.kind,
            "key": run.key(),
            "rounds": run.rounds,
            "sites": ["pooled"] if run.file.kind == "pooled" else [one for one in run.sites if one != run.held_out],
            "folders": [
                os.path.relpath(folder, comparison.out)
                for folder in dict.fromkeys((run.shared_folder(comparison.out), run.training_folder(comparison.out)))
            ],
        }
        for run in comparison.runs
    ]
    sites, rounds = list(comparison.runs[0].sites), comparison.runs[0].rounds
    records = str(comparison.record_file.resolve())
    total = Expected(missing, comparison.out).total
    return Progress("comparison", name, command, sites, rounds, runs, records, total)


def _outdated(comparison: Any) -> list[str]:
    """What is wrong with records of something else than there is now, one sentence for each reason."""
    return [
        f"{len(names)} record(s) are of other {OUTDATED[what]} ({'; '.join(names)})"
        for what, names in comparison.outdated().items()
    ]


def _runs(
    data: Path,
    names: list[str],
    seeds: str,
    rounds: int,
    bundle: str,
    validate_every: int,
    unseen: bool,
    nvflare: bool,
    aggregation: str | None,
    overrides: dict[str, Any],
) -> list[Any]:
    from pfedsam.comparison.planned import of_seed, planned_runs
    from pfedsam.data.site_folder import site_names

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{seeds}' are no numbers", param_hint="--seeds") from None
    wrong = [seed for seed in chosen if not 0 <= seed <= LARGEST_SEED]
    if wrong:
        raise typer.BadParameter(f"{wrong} are not from 0 to {LARGEST_SEED}", param_hint="--seeds")
    for folder in dict.fromkeys(of_seed(data, seed) for seed in chosen):
        if not site_names(folder):
            raise typer.BadParameter(f"{folder} holds no site folder (<data>/<site>/images)", param_hint="DATA")
    common = {"validate_every": validate_every, "simulator": nvflare, "aggregation": aggregation}
    return planned_runs(data, names, chosen, rounds, bundle, overrides, unseen, **common)


def show_comparison(comparison: Any, reference: str) -> None:
    """Print the tables of what is done and name what is missing; write them to `tables.md` in its folder."""
    from pfedsam.comparison.records import problem_of_record
    from pfedsam.comparison.tables import markdown, tables, warnings

    records = []
    for record in comparison.records():
        problem = problem_of_record(record)
        if problem:
            warning = f"{comparison.record_file}: the record {record['key']} is left out: {problem}"
            console.print(warning, style="yellow", highlight=False)
        else:
            records.append(record)
    missing = [run.name for run in comparison.missing()]
    if records:
        outdated = _outdated(comparison)
        for line in outdated:
            console.print(line, style="red", highlight=False, soft_wrap=True)
        for table in tables(records, reference, console.width):
            console.print(table)
        for line in warnings(records):
            console.print(line, style="yellow", highlight=False)
        comparison.out.mkdir(parents=True, exist_ok=True)
        file = comparison.out / "tables.md"
        warned = "".join(f"**{line}**\n\n" for line in outdated)
        file.write_text(warned + markdown(records, reference, missing))
        console.print(f"the same as Markdown: {file}")
    if missing:
        console.print(f"missing: {len(missing)} run(s): {'; '.join(missing)}", style="yellow", highlight=False)
