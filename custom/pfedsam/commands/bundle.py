"""`pfedsam new-bundle` and `verify-bundle`: for people who write bundles."""

from __future__ import annotations

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
    modality: Annotated[str, typer.Option(help="mri: grey volumes; rgb: colour pictures.")] = "mri",
    nested: Annotated[bool, typer.Option("--nested", help="Each class lies inside the one before.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write into; by default where pfedsam finds it.")] = None,
) -> None:
    """Make a MONAI bundle for your own task: configuration only, ready to train, federate and infer.

    Example: pfedsam new-bundle liver_mri --classes liver,tumour --nested
    """
    from pfedsam.bundle_tools.new import new_bundle as write
    from pfedsam.bundles import own_bundles

    root = out or own_bundles()
    path = write(name, [label.strip() for label in classes.split(",")], modality, root, nested)  # type: ignore[arg-type]
    console.print(f"{path}", highlight=False)
    console.print("Next, with a site folder of yours:")
    console.print(f"  pfedsam validate <site> --bundle {name}\n  pfedsam simulate <data> --bundle {name}")
    if root != own_bundles():
        console.print(f"So that pfedsam finds it: export PFEDSAM_BUNDLES={root.resolve()}")


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
