"""`pfedsam job`: NVFlare jobs as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import Job, console

app = typer.Typer(help="NVFlare jobs.", no_args_is_help=True)


@app.command("export")
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


@app.command("allow")
def job_allow(
    workspace: Annotated[Path, typer.Argument(help="Workspace of a site, a server or the simulator.")],
    job: Job = "pfedsam",
) -> None:
    """Allow the classes of a locked job at a site: adds them to <workspace>/local/resources.json."""
    from pfedsam.federated.jobs import allow_classes, find_job

    path, added = allow_classes(find_job(job), workspace)
    console.print(f"{path}: {len(added)} classes added", *added, sep="\n  ", highlight=False)
