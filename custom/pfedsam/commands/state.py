"""`pfedsam state`: what the sites keep on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam.commands.console import StateRoot, console
from pfedsam.errors import PFedSAMError

app = typer.Typer(help="The personal state of the sites on this machine.", no_args_is_help=True)


@app.command("list")
def state_list(
    root: StateRoot = None,
) -> None:
    """Show the state of every federation and site under the state root."""
    from rich.table import Table

    from pfedsam.state import list_states, state_root

    where = root or state_root()
    table = Table(title=f"personal state under {where}")
    for column in ("federation", "site", "bundle", "fingerprint", "round", "final", "personal Dice", "problem"):
        table.add_column(column)
    for entry in list_states(where):
        info = entry.info
        dice = info.get("val_dice_personal")
        final = {True: "yes", False: "no"}.get(info.get("final"), "")  # type: ignore[arg-type]
        shown = (str(info.get("round", "")), final, "" if dice is None else f"{dice:.3f}", entry.problem)
        table.add_row(entry.federation, entry.site, entry.bundle, entry.fingerprint, *shown)
    console.print(table)


@app.command("export")
def state_export(
    federation: str,
    site: str,
    out: Annotated[Path, typer.Argument(help="File to write: the pair of shared and personal tensors.")],
    root: StateRoot = None,
) -> None:
    """Write a site's model without the optimiser's moments. It holds personal tensors: keep it at the site."""
    from pfedsam.site_model import read, write

    model = read(_one_state(federation, site, root).file)
    model.moments = {}
    write(out, model)
    console.print(f"{out} written: round {model.info.get('round')}, {len(model.personal)} personal tensors")


@app.command("delete")
def state_delete(
    federation: str,
    site: str,
    root: StateRoot = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a site's state for good, for example when it leaves a federation."""
    from pfedsam.state import delete_state

    entry = _one_state(federation, site, root)
    if not yes:
        typer.confirm(f"Delete {entry.folder} for good?", abort=True)
    delete_state(entry)
    console.print(f"deleted {entry.folder}")


def _one_state(federation: str, site: str, root: Path | None) -> Any:
    from pfedsam.state import list_states, state_root

    where = root or state_root()
    found = [entry for entry in list_states(where) if (entry.federation, entry.site) == (federation, site)]
    if len(found) != 1:
        raise PFedSAMError(
            "E13",
            f"{len(found)} states of site '{site}' in federation '{federation}' under {where}, expected one.",
            "See `pfedsam state list`.",
        )
    return found[0]
