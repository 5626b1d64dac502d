"""`pfedsam new-bundle` and `verify-bundle`: for people who write bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import console, quiet_libraries
from pfedsam.commands.listing import DATA

app = typer.Typer()


@app.command("new-bundle", rich_help_panel=DATA)
def new_bundle(
    name: Annotated[str, typer.Argument(help="Of the bundle: letters, digits, underscore.")],
    classes: Annotated[str, typer.Option(help="Names with commas; label value n is the n-th, 0 is background.")],
    modality: Annotated[
        str,
        typer.Option(help="mri: grey volumes; grey: grey pictures (X-ray, ultrasound); rgb: colour pictures."),
    ] = "mri",
    nested: Annotated[bool, typer.Option("--nested", help="Each class lies inside the one before.")] = False,
    mirrored: Annotated[
        bool | None,
        typer.Option(
            help="Classes mirror each other, as left and right lung: then no training image is mirrored. By default "
            "by their names, else it asks."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write into; by default where pfedsam finds it.")] = None,
) -> None:
    """Make a MONAI bundle for your own task: configuration only, ready to train, federate and infer.

    Example: pfedsam new-bundle liver_mri --classes liver,tumour --nested
    """
    from pfedsam.bundle_tools.explain import explained
    from pfedsam.bundle_tools.new import check_names
    from pfedsam.bundle_tools.new import new_bundle as write
    from pfedsam.bundles import own_bundles

    root, names = out or own_bundles(), [label.strip() for label in classes.split(",")]
    check_names(name, names, modality)
    sides = _mirrored(names, nested) if mirrored is None else mirrored
    path = write(name, names, modality, root, nested, sides)  # type: ignore[arg-type]
    console.print(f"{path}", highlight=False, soft_wrap=True)
    for line in explained(path):
        console.print(line, highlight=False, soft_wrap=True)
    console.print("\nNext, with <data>/<site>/images and <data>/<site>/labels of yours:", highlight=False)
    console.print(
        f"  pfedsam split <data>                            # fewer than about 30 patients a site: an even split\n"
        f"  pfedsam validate <data>/<site> --bundle {name}\n"
        f"  pfedsam simulate <data> --bundle {name} --out runs/{name}",
        highlight=False,
        soft_wrap=True,
    )
    if root != own_bundles():
        console.print(f"So that pfedsam finds it: export PFEDSAM_BUNDLES={root.resolve()}", soft_wrap=True)


def _mirrored(names: list[str], nested: bool) -> bool:
    """Whether classes mirror each other: by their names, else by what a person at a terminal says."""
    from pfedsam.bundle_tools.mirroring import name_sides

    pairs = name_sides(names)
    if pairs:
        told = ", ".join(" and ".join(pair) for pair in pairs)
        console.print(f"{told} are taken to mirror each other (else: --no-mirrored)", highlight=False, soft_wrap=True)
        return True
    # one class has no other side, and of nested ones each lies inside the other
    if len(names) < 2 or nested:
        return False
    if sys.stdin.isatty():
        return typer.confirm("Do classes mirror each other left to right, as left and right lung?", default=False)
    console.print("classes are taken not to mirror each other left to right (else: --mirrored)", soft_wrap=True)
    return False


@app.command("bundle-weights", rich_help_panel=DATA)
def bundle_weights(
    folder: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="A global model, a site's model or the folder of a run; of a site's model the shared part alone. By "
            "default the base weights, not trained for the task."
        ),
    ] = None,
) -> None:
    """Write a bundle's models/model.pt, the weights that MONAI's model zoo asks for. Nothing personal is in it.

    Example: pfedsam bundle-weights bundles/brain_lesion_mri --model runs/mine
    """
    with console.status("building the network"):
        quiet_libraries()
        from pfedsam.bundle_tools.weights import make_weights

        path = make_weights(folder, model)
    of = f"the global model of {model}" if model else "the base weights, not trained for the task"
    console.print(f"{path}: {of}", highlight=False, soft_wrap=True)


@app.command("verify-bundle", rich_help_panel=DATA)
def verify_bundle(
    folder: Annotated[Path, typer.Argument(help="The bundle's folder; it need not be one of ours.")],
    schema: Annotated[Path, typer.Option(help="File of MONAI's metadata schema (meta_schema_20240725.json).")],
    data: Annotated[
        Path | None, typer.Option(help="Site folder for the tiny runs; by default made to fit the metadata.")
    ] = None,
) -> None:
    """Check a bundle offline as MONAI's model zoo does: one line a check; exit code 1 if one fails."""
    with console.status("loading libraries"):
        quiet_libraries()
        from pfedsam.bundle_tools.verify import Bundle
        from pfedsam.bundle_tools.verify import verify_bundle as checks

    failed = 0
    for check in checks(Bundle(folder, schema, data)):
        failed += not check.passed
        mark, style = ("ok    ", "green") if check.passed else ("FAILED", "bold red")
        console.print(f"[{style}]{mark}[/] {check.name}: ", end="", markup=True)
        console.print(check.message, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)
