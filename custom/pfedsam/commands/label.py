"""`pfedsam label-server`: a site's model in 3D Slicer, through MONAI Label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import ModelBundle, Overrides, console, literals, quiet_libraries
from pfedsam.commands.interrupts import ends_in_order
from pfedsam.commands.listing import LOOK

app = typer.Typer()


@app.command("label-server", rich_help_panel=LOOK)
def label_server(
    site: Annotated[Path, typer.Argument(help="Site folder; its NIfTI volumes are the cases.")],
    model: Annotated[Path, typer.Option(help="Model file of the site, or a folder that holds one.")],
    monailabel: Annotated[
        Path | None,
        typer.Option(
            envvar="PFEDSAM_MONAILABEL", help="Python of the environment with MONAI Label; by default this one."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the server; 0 takes a free one.")] = 8000,
    bundle: ModelBundle = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(envvar="PFEDSAM_CHECKPOINT", help="Path of the base weights; by default the bundle's."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Serve a site's model to 3D Slicer with MONAI Label: segment, with a box, correct, submit the label.

    The personal model computes as in `infer --engine torch`. The server answers on this machine only, at an address
    with a random token: who has the address sees the images. A label that is submitted becomes the label of its case;
    where there is one, it goes into the folder `corrections`. No file is replaced or deleted. Ctrl-C ends it. Research
    only, not for diagnostic use.
    """
    overrides = literals(set_ or [])
    quiet_libraries()
    with ends_in_order("The server is closed. What was submitted is in the site folder; nothing else was kept."):
        with console.status("loading the model"):
            from pfedsam.api import load_model
            from pfedsam.clinic.desk import Desk
            from pfedsam.clinic.serving import LabelServer, find_monailabel, scratch_folder

            python = find_monailabel(monailabel)
            loaded = load_model(model, overrides=overrides, bundle=bundle, checkpoint=checkpoint, engine="torch")
        with scratch_folder() as scratch:
            desk = Desk(site, loaded, scratch)
            console.print(desk.about()["description"], highlight=False, soft_wrap=True)

            def ready(address: str) -> None:
                console.print(f"{len(desk.cases())} volume(s). Give 3D Slicer this MONAI Label server:")
                console.print(address, highlight=False, soft_wrap=True)
                console.print("It is for you alone: who has it sees the images. Ctrl-C ends the server.")

            with LabelServer(desk, python, port) as server:
                console.print("starting MONAI Label ...")
                server.serve(ready)
