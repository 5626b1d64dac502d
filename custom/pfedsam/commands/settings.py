"""`pfedsam settings`: what each setting of a bundle means, its unit and range, and who may set it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pfedsam.commands.console import console
from pfedsam.commands.listing import LOOK

app = typer.Typer()


@app.command("settings", rich_help_panel=LOOK)
def settings(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the settings of a bundle: meaning, unit, range, and who may set each.

    What a job may set is given by --set key=value, or by `overrides` of a strategy or a job. `pfedsam describe BUNDLE`
    shows the values.
    """
    from pfedsam.settings import all_settings

    if as_json:
        print(json.dumps([asdict(setting) for setting in all_settings().values()], indent=2))
        return
    table = Table("name", "meaning", "allowed", "set by", title="settings of a bundle")
    for setting in all_settings().values():
        allowed = setting.allowed + (f" ({setting.unit})" if setting.unit else "")
        table.add_row(setting.name, setting.meaning, allowed, setting.by)
    console.print(table)
