"""The `pfedsam` command. A command is imported when it is called, and heavy libraries by those that need them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pfedsam import __version__
from pfedsam.commands.listing import OnDemand
from pfedsam.errors import PFedSAMError

app = typer.Typer(
    cls=OnDemand,
    help="Personalised federated fine-tuning of the Segment Anything Model. Research only, not for diagnostic use.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1. What a command writes is closed to other users."""
    os.umask(0o077)
    try:
        app()
    except PFedSAMError as error:
        from rich.console import Console
        from rich.markup import escape

        line = f"[bold red]error[/] {escape(str(error))}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"pfedsam {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
