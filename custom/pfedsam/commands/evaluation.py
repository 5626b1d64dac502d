"""`pfedsam evaluate`, and the table and pictures at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam.commands.console import Force, ModelBundle, Overrides, bar, console, literals, quiet_libraries
from pfedsam.commands.listing import LOOK
from pfedsam.ownership import require_free, require_ours, use

app = typer.Typer()


@app.command(rich_help_panel=LOOK)
def evaluate(
    site: Annotated[Path, typer.Argument(help="Site folder.")],
    model: Annotated[
        Path, typer.Argument(help="The site's state.safetensors or model; or the folder of a `simulate` or `compare`.")
    ],
    bundle: ModelBundle = None,
    section: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    strategy: Annotated[str | None, typer.Option(help="Of a `compare`: whose model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of a `compare`: of which seed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("runs/evaluate"),
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """Dice of the global and the personal model of one site, with a picture.

    In the folder of a run it is the model of the site that is named as the site folder.
    An earlier evaluation in --out is replaced; a folder of anything else is used with --force only.
    """
    overrides = literals(set_ or [])
    require_ours(out, "evaluation", force)
    with console.status("loading libraries"):
        quiet_libraries()
        from pfedsam.storage.model_files import only_model
        from pfedsam.storage.run_models import find_run_model
        from pfedsam.storage.site_model import model_settings
        from pfedsam.storage.state_files import described

        own_name = site.resolve().name
        file, _ = find_run_model(model, None if only_model(model) else own_name, strategy, seed)
        name, settings = model_settings(file, bundle, overrides)
    console.print(described(file), highlight=False, soft_wrap=True)
    use(out, "evaluation", force)
    show_evaluation({own_name: (site, file)}, name, settings, out, {}, section)


@app.command(rich_help_panel=LOOK)
def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `pfedsam demo` or `pfedsam simulate`.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; <run>/report.html by default.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Records of `pfedsam compare` with local_only: where is a site better alone?")
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="Images of patients and results of single cases; without them to show it outside.")
    ] = True,
    force: Force = False,
) -> None:
    """One self-contained page about a run: tables, curves, pictures, warnings. It names sites, never cases.

    It tells what each site serves, and whether personalisation pays there; the terminal shows this too.
    The run's own report.html is written anew; another file that is there already is replaced with --force only.
    """
    if out is not None and out.resolve() != (run / "report.html").resolve():
        require_free(out, force, keep=[run / "results.json", *([compare] if compare else [])])
    with console.status("writing the report"):
        quiet_libraries()
        from pfedsam.report.page import served_lines, write_report

        path = write_report(run, out, compare, pictures=pictures)
        lines = served_lines(run)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB; open it in a browser)")


def show_evaluation(
    models: dict[str, tuple[Path, Path]], bundle: str, overrides: Any, out: Path, sent: Any, section: str = "test"
) -> None:
    """Evaluate sites, write pictures and `results.json`, and print the table.

    Args:
        models: site folder and model file of each site.
        bundle: name of an installed bundle.
        overrides: of the bundle, as in training.
        out: folder to write to.
        sent: bytes that left each site, by round.
        section: of the split.
    """
    quiet_libraries()
    from pfedsam.data.reader import load_picture
    from pfedsam.evaluation.pictures import case_picture
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.evaluation.tables import site_table, write_results

    evaluations = []
    for site, (data, model) in models.items():
        with bar(f"evaluating {site}", 1) as advance:
            how: dict[str, Any] = {"overrides": overrides, "section": section, "site": site, "output_dir": out}
            evaluation = evaluate_site(bundle, data, model, progress=advance.total, **how)
        evaluations.append(evaluation)
        for note in evaluation.notes:
            console.print(f"{site}: {note}", style="yellow", highlight=False)
        for name, example in evaluation.examples.items():
            image = load_picture(example.image)
            case_picture(evaluation, name, image, out / "pictures" / f"{site}-{name}.png")
    table = write_results(evaluations, sent, out, bundle, overrides, section)
    console.print(site_table(table, f"{bundle}: {section} cases"))
    console.print(f"pictures: {out / 'pictures'}    all numbers: {out / 'results.json'}")
