"""`pfedsam errors`: what a code means, for who sees no more than the code."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from pfedsam.commands.console import console
from pfedsam.commands.listing import LOOK
from pfedsam.errors import ErrorCode

app = typer.Typer()


@app.command("errors", rich_help_panel=LOOK)
def errors(
    codes: Annotated[
        list[ErrorCode] | None, typer.Argument(metavar="[CODE]...", help="Such as E07; none: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what an error code means and what helps.

    A server learns the code of a site's error and nothing else; the sentence is in the log of the site.
    """
    shown = codes or list(ErrorCode)
    if as_json:
        print(json.dumps({code.value: {"meaning": code.meaning, "remedy": code.remedy} for code in shown}, indent=2))
        return
    table = Table("code", "meaning", "what helps", title="error codes")
    for code in shown:
        table.add_row(code.value, code.meaning, code.remedy)
    console.print(table)
