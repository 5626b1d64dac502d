"""`pfedsam view`: images, truth and what the models find, in a page on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import ModelBundle, Overrides, console, literals, quiet_libraries
from pfedsam.commands.listing import LOOK
from pfedsam.errors import ErrorCode, PFedSAMError

app = typer.Typer()


@app.command(rich_help_panel=LOOK)
def view(
    what: Annotated[
        Path,
        typer.Argument(help="An image, a folder of one DICOM series, a site folder, or the run folder of `simulate`."),
    ],
    model: Annotated[
        Path | None, typer.Option("--model", help="Model file of a site, or a folder that holds one.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="The truth: a label, or a folder of labels named as the images; by default the site's."),
    ] = None,
    site: Annotated[str | None, typer.Option(help="Which site of a run folder.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Of a run folder: the folder with its site folders, if it does not say.")
    ] = None,
    kit: Annotated[
        Path | None, typer.Option(help="The site's startup kit: its settings say what the values of its labels mean.")
    ] = None,
    bundle: ModelBundle = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(envvar="PFEDSAM_CHECKPOINT", help="Path of the base weights; by default the bundle's."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 0,
    set_: Overrides = None,
) -> None:
    """Look at images in a browser: truth, both models, differences, probabilities; correct and save masks.

    The page is served to this machine alone, at an address with a random token: who has the address sees the images.
    A corrected mask becomes the label of its case in the site folder; where there is a label, it goes into the folder
    `corrections` beside it. No file is replaced. From another machine: `ssh -L PORT:127.0.0.1:PORT` with the same
    --port. Ctrl-C ends it. Research only, not for diagnostic use.
    """
    overrides = literals(set_ or [])
    quiet_libraries()
    with console.status("loading libraries"):
        label_map = None if kit is None else _label_map(kit)
        from pfedsam.viewer.server import ViewerServer
        from pfedsam.viewer.session import Session
        from pfedsam.viewer.subjects import subjects_of

        subjects = subjects_of(what, model, labels, site, data)
        session = Session(subjects, bundle, overrides, checkpoint, label_map=label_map)
        if len(session.subjects) == 1:
            # what is wrong with the one image is told here, not in the page alone
            session.about(0)
        try:
            server = ViewerServer(session, port)
        except OSError as error:
            message = f"port {port} cannot be used: {error.strerror}."
            raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "Leave --port out, which takes a free one.") from None
    with server:
        console.print(f"{len(session.subjects)} image(s). Open this address in a browser of this machine:")
        console.print(server.address, highlight=False, soft_wrap=True)
        console.print("It is for you alone: who has it sees the images. Ctrl-C ends the viewer.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("\nThe viewer is closed. What was saved is in the site folder; nothing else was written.")


def _label_map(kit: Path) -> dict[str, str] | None:
    """What a site's label values mean, by its own settings."""
    from pfedsam.federated.settings import SITE_SETTINGS, read_settings

    path = kit / "local" / SITE_SETTINGS
    if not path.is_file():
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"there is no {path}.", "Make the kit ready: `pfedsam site init`.")
    return read_settings(path).labels
