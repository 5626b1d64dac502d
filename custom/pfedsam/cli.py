"""The `pfedsam` command. Heavy libraries are imported by the commands that need them, not for `--help`."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pfedsam import __version__
from pfedsam.commands import (
    audit,
    bundle,
    compare,
    data,
    errors,
    evaluation,
    federation,
    inference,
    job,
    models,
    poc,
    settings,
    site,
    state,
)
from pfedsam.commands.console import OPERATE, console
from pfedsam.errors import PFedSAMError

app = typer.Typer(
    help="Personalised federated fine-tuning of the Segment Anything Model. Research only, not for diagnostic use.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for part in (
    *(data.app, bundle.app, models.app, settings.app, errors.app),
    *(federation.app, evaluation.app, compare.app, inference.app),
):
    app.add_typer(part)
app.add_typer(state.app, name="state", rich_help_panel=OPERATE)
app.add_typer(job.app, name="job", rich_help_panel=OPERATE)
app.add_typer(poc.app, name="poc", rich_help_panel=OPERATE)
app.add_typer(site.app, name="site", rich_help_panel=OPERATE)
app.add_typer(audit.app)


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1. What a command writes is closed to other users."""
    os.umask(0o077)
    try:
        app()
    except PFedSAMError as error:
        line = f"[bold red]error[/] {escape(str(error))}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"pfedsam {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
