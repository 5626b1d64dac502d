"""The `pfedsam` command. Heavy libraries are imported by the commands that need them, not for `--help`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pfedsam import __version__
from pfedsam.errors import PFedSAMError

app = typer.Typer(
    help="Personalised federated fine-tuning of the Segment Anything Model. Research only, not for diagnostic use.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
state_app = typer.Typer(help="The personal state of the sites on this machine.", no_args_is_help=True)
job_app = typer.Typer(help="NVFlare jobs.", no_args_is_help=True)
app.add_typer(state_app, name="state")
app.add_typer(job_app, name="job")
console = Console()

#: The demo is as small as it can be and still show the effect in minutes on two cores.
DEMO_CASES = 9
DEMO_SHAPE = (96, 96, 12)
DEMO_ROUNDS = 6
DEMO_OVERRIDES: dict[str, Any] = {
    "adapted_blocks": 1,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 4,
    "negatives_per_case": 2,
    "cache_limit_gb": 1,
}

RunFolder = Annotated[Path, typer.Option("--out", help="Run folder; a run that was stopped goes on in it.")]
Bundle = Annotated[str, typer.Option(help="Name of an installed bundle.")]


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1."""
    try:
        app()
    except PFedSAMError as error:
        Console(stderr=True).print(f"[bold red]error[/] {error}", highlight=False, soft_wrap=True, markup=True)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"pfedsam {__version__}")
        raise typer.Exit


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write the site folders to.")],
    sites: Annotated[int, typer.Option(min=2, help="Number of sites; the last is the most shifted.")] = 4,
    cases: Annotated[int, typer.Option(min=3, help="Cases of each site.")] = 12,
    size: Annotated[int, typer.Option(min=16, help="In-plane voxels of a side.")] = 96,
    slices: Annotated[int, typer.Option(min=4, help="Slices of a case.")] = 20,
    seed: Annotated[int, typer.Option(help="Same seed, same volumes.")] = 0,
) -> None:
    """Write a phantom federation: head volumes with lesions as NIfTI, each site with its own scanner."""
    folders = _phantom(out, sites, cases, (size, size, slices), seed)
    console.print(f"{len(folders)} site folders with {cases} cases each in {out}")
    console.print(f"Next: pfedsam validate {out / 'site-1'}    or: pfedsam simulate {out} --out runs/simulation")


@app.command()
def validate(
    site: Annotated[Path, typer.Argument(help="Site folder with images/ and labels/.")],
    labels: Annotated[str, typer.Option(help="Label values that the bundle knows, comma-separated.")] = "0,1",
    minimum_cases: Annotated[int, typer.Option(min=1, help="Fewer cases are an error.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the split, if there is no datalist.json.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a site folder before it joins: pairs, shapes, labels, geometry, duplicates, splits. Changes nothing."""
    from pfedsam.data.checks import check_site, print_report

    with console.status("reading all cases"):
        report = check_site(site, [int(v) for v in labels.split(",")], minimum_cases=minimum_cases, seed=seed)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, console)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def simulate(
    data: Annotated[Path, typer.Argument(help="Folder that holds the site folders.")],
    out: RunFolder = Path("runs/simulation"),
    job: Annotated[str, typer.Option(help="Name of a packaged job, or a job folder.")] = "pfedsam",
    federation: Annotated[str, typer.Option(help="Name of the federation: the state of the sites is keyed by it.")] = (
        "simulation"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds in all; by default the job's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws, and the test fold: seed modulo 3.")] = 0,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Validate every so many rounds only.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the bundle, as key=value; may be repeated.")
    ] = None,
) -> None:
    """Simulate a federation of the site folders in DATA with NVFlare, and show what each site gained."""
    from pfedsam.federated.simulation import Simulation

    overrides = {"seed": seed, **_literals(set_ or [])}
    strategy = {} if validate_every is None else {"validate_every": validate_every}
    _federate(Simulation(data, out, job, federation, rounds, overrides, strategy))


@app.command()
def demo(
    out: RunFolder = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of phantom, draws and split.")] = 0,
    image_size: Annotated[
        int, typer.Option(help="Side of the network's input in pixels; 128 is better and takes 4 times as long.")
    ] = 64,
) -> None:
    """The main job on a phantom federation of 4 sites: some minutes on a laptop, no data and no GPU needed."""
    from pfedsam.federated.simulation import Simulation

    data = out / "phantom"
    _phantom(data, 4, DEMO_CASES, DEMO_SHAPE, seed)
    overrides = {"seed": seed, "image_size": image_size, **DEMO_OVERRIDES}
    strategy = {"validate_every": 2}
    _federate(Simulation(data, out, "pfedsam", "phantom-demo", DEMO_ROUNDS, overrides, strategy))
    console.print("Next, with data of your own, one folder for each site, <data>/<site>/images and labels:")
    console.print("  pfedsam validate <data>/<site>\n  pfedsam simulate <data> --out runs/mine")


@app.command()
def evaluate(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    model: Annotated[Path, typer.Argument(help="state.safetensors or model.safetensors of the site.")],
    bundle: Bundle = "brain_lesion_mri",
    section: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("runs/evaluate"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the bundle, as in training; may be repeated.")
    ] = None,
) -> None:
    """Dice of the global and the personal model of one site, with a picture."""
    _evaluate({site.name: (site, model)}, bundle, _literals(set_ or []), out, {}, section)


@state_app.command("list")
def state_list(
    root: Annotated[Path | None, typer.Option(help="State root; by default as in training.")] = None,
) -> None:
    """Show the state of every federation and site under the state root."""
    from rich.table import Table

    from pfedsam.state import list_states, state_root

    where = root or state_root()
    table = Table(title=f"personal state under {where}")
    for column in ("federation", "site", "bundle", "fingerprint", "round", "final", "personal Dice", "problem"):
        table.add_column(column)
    for entry in list_states(where):
        info = entry.info
        dice = info.get("val_dice_personal")
        final = {True: "yes", False: "no"}.get(info.get("final"), "")  # type: ignore[arg-type]
        shown = (str(info.get("round", "")), final, "" if dice is None else f"{dice:.3f}", entry.problem)
        table.add_row(entry.federation, entry.site, entry.bundle, entry.fingerprint, *shown)
    console.print(table)


@state_app.command("export")
def state_export(
    federation: str,
    site: str,
    out: Annotated[Path, typer.Argument(help="File to write: the pair of shared and personal tensors.")],
    root: Annotated[Path | None, typer.Option(help="State root; by default as in training.")] = None,
) -> None:
    """Write a site's model without the optimiser's moments. It holds personal tensors: keep it at the site."""
    from pfedsam.site_model import read, write

    model = read(_one_state(federation, site, root).file)
    model.moments = {}
    write(out, model)
    console.print(f"{out} written: round {model.info.get('round')}, {len(model.personal)} personal tensors")


@state_app.command("delete")
def state_delete(
    federation: str,
    site: str,
    root: Annotated[Path | None, typer.Option(help="State root; by default as in training.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a site's state for good, for example when it leaves a federation."""
    from pfedsam.state import delete_state

    entry = _one_state(federation, site, root)
    if not yes:
        typer.confirm(f"Delete {entry.folder} for good?", abort=True)
    delete_state(entry)
    console.print(f"deleted {entry.folder}")


@job_app.command("export")
def job_export(
    job: Annotated[str, typer.Argument(help="Name of a packaged job, or a job folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    locked: Annotated[bool, typer.Option("--locked", help="Without app/custom: sites must allow its classes.")] = False,
    federation: Annotated[str | None, typer.Option(help="Name of the federation.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    min_clients: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Write a job folder that can be submitted as it is."""
    from pfedsam.federated.jobs import export_job, find_job

    server = {"num_rounds": rounds, "min_clients": min_clients}
    export_job(
        find_job(job),
        out,
        locked=locked,
        plan={"federation": federation} if federation else {},
        server={key: value for key, value in server.items() if value is not None},
    )
    console.print(f"{out} written" + (", locked: it carries no code" if locked else ""))


@job_app.command("allow")
def job_allow(
    workspace: Annotated[Path, typer.Argument(help="Workspace of a site, a server or the simulator.")],
    job: Annotated[str, typer.Option(help="Name of a packaged job, or a job folder.")] = "pfedsam",
) -> None:
    """Allow the classes of a locked job at a site: adds them to <workspace>/local/resources.json."""
    from pfedsam.federated.jobs import allow_classes, find_job

    path, added = allow_classes(find_job(job), workspace)
    console.print(f"{path}: {len(added)} classes added", *added, sep="\n  ", highlight=False)


def _phantom(out: Path, sites: int, cases: int, shape: tuple[int, int, int], seed: int) -> list[Path]:
    with console.status("loading libraries"):
        from pfedsam.data.phantom import write_phantom

    with _bar("writing phantom cases", sites * cases) as advance:
        return write_phantom(out, sites, cases, shape, seed, progress=lambda done, total: advance(done))


def _federate(simulation: Any) -> None:
    with console.status("loading libraries"):
        from pfedsam.federated.jobs import find_job, plan_settings, server_settings
        from pfedsam.federated.simulation import expected_events, run, sent_bytes

    out: Path = simulation.out
    out.mkdir(parents=True, exist_ok=True)
    job = find_job(simulation.job)
    rounds = simulation.rounds or server_settings(job)["num_rounds"]
    console.print(
        f"{len(simulation.sites)} sites, {rounds} rounds, then the final personal phase; log: {out}/simulator.log"
    )
    done = 0
    with _bar("starting", expected_events(simulation, rounds)) as advance:

        def event(line: str) -> None:
            nonlocal done
            done += 1
            advance(done, line)

        if not run(simulation, event):
            console.print("this federation has finished before; its sites are evaluated again")
    states = simulation.states()
    models = {site: (simulation.data / site, states[site].file) for site in simulation.sites}
    _evaluate(models, plan_settings(job)["bundle"], simulation.overrides, out, sent_bytes(simulation))
    console.print(f"personal state: {simulation.state_root} (pfedsam state list --root {simulation.state_root})")


def _evaluate(
    models: dict[str, tuple[Path, Path]], bundle: str, overrides: Any, out: Path, sent: Any, section: str = "test"
) -> None:
    from monai.transforms import LoadImage

    _quiet_libraries()
    from pfedsam.evaluation.pictures import site_picture
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.evaluation.tables import results, site_table

    evaluations = []
    for site, (data, model) in models.items():
        with _bar(f"evaluating {site}", 1) as advance:
            found = evaluate_site(
                bundle, data, model, overrides=overrides, section=section, output_dir=out, progress=advance.total
            )
        evaluations.append(found)
        if found.shown is not None:
            image = LoadImage(image_only=True)(_image_of(data, found.shown.case)).numpy()
            site_picture(found, image, out / "pictures" / f"{site}.png")
    table = results(evaluations, sent)
    (out / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    console.print(site_table(table, f"{bundle}: {section} cases"))
    console.print(f"pictures: {out / 'pictures'}    all numbers: {out / 'results.json'}")


def _quiet_libraries() -> None:
    """Leave out what MONAI says at each start about optional parts; errors stay."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", message=".*NvImgCodec.*")
    for name in ("monai.bundle.workflows", "monai.data.nvimgcodec_pydicom_plugin"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _image_of(data: Path, case: str) -> Path:
    from pfedsam.data.sites import read_site

    return next(one.image for one in read_site(data) if one.name == case)


def _one_state(federation: str, site: str, root: Path | None) -> Any:
    from pfedsam.state import list_states, state_root

    where = root or state_root()
    found = [entry for entry in list_states(where) if (entry.federation, entry.site) == (federation, site)]
    if len(found) != 1:
        raise PFedSAMError(
            "E13",
            f"{len(found)} states of site '{site}' in federation '{federation}' under {where}, expected one.",
            "See `pfedsam state list`.",
        )
    return found[0]


def _literals(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts as JSON literals, else as strings."""
    literals: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise PFedSAMError("E18", f"override {shlex.quote(pair)} is not key=value.", "For example: batch_size=4")
        try:
            literals[key] = json.loads(value)
        except ValueError:
            literals[key] = value
    return literals


class _Advance:
    """Moves a progress bar: `advance(done, text)`, or `advance.total(done, total)`."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def __call__(self, done: int, text: str | None = None) -> None:
        described: Any = {} if text is None else {"description": text}
        self._progress.update(self._task, completed=done, **described)

    def total(self, done: int, total: int) -> None:
        """Set both numbers."""
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def _bar(text: str, total: int) -> Iterator[_Advance]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Advance(progress, progress.add_task(text, total=total))


if __name__ == "__main__":
    main()
