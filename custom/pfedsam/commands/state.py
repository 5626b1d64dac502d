"""`pfedsam state`: what the sites keep on this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pfedsam.commands.console import Force, StateRoot, console
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import require_free

if TYPE_CHECKING:
    from pfedsam.storage.state_list import StateEntry

app = typer.Typer(name="state", help="The personal state of the sites on this machine.", no_args_is_help=True)

Kit = Annotated[Path | None, typer.Option(help="The site's startup kit, in place of --root: what its settings say.")]
Fingerprint = Annotated[str, typer.Option(help="How the fingerprint begins, if there is more than one state.")]
#: Characters of a value that a state tells of itself.
_LONGEST = 12
#: What a simulation says of itself in its folder.
TERMS_FILE = "run.json"
Bundle = Annotated[str | None, typer.Option(help="Name of the bundle, if there are states of more than one.")]


@app.command("list")
def state_list(root: StateRoot = None, kit: Kit = None) -> None:
    """Show the state of every federation and site under the state root, and the path of each.

    The path is what `infer --model`, `evaluate` and `export-model` take. --root may be the folder of a `simulate`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from pfedsam.storage.state_files import told_dice
    from pfedsam.storage.state_list import list_states

    where = _where(root, kit)
    entries = list_states(where)
    if not entries:
        console.print(_nothing(where), highlight=False, soft_wrap=True)
        return
    table = Table(title=f"personal state under {where}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "federation", "site", "round", "final", "Dice", "best"):
        table.add_column(column, overflow="fold")
    for number, entry in enumerate(entries, 1):
        info, best = entry.info, entry.best
        final = {True: "yes", False: "no"}[info["final"]] if isinstance(info.get("final"), bool) else ""
        kept = f"{_dice(told_dice(best))} (round {_shown(best.get('round'))})" if told_dice(best) is not None else ""
        shown = (_shown(info.get("round")), final, _dice(info.get("val_dice_personal")), kept)
        table.add_row(str(number), entry.federation, entry.site, *shown)
    console.print(table)
    console.print("Dice: of the personal model on validation cases. Each number above is one of these files:")
    for number, entry in enumerate(entries, 1):
        # a path is copied: it is never cut, and never broken
        console.print(f"{number}  {entry.file}", highlight=False, soft_wrap=True)
        if entry.problem:
            console.print(f"   problem: {entry.problem}", style="yellow", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    """A value that a state tells of itself: whoever wrote the file, it may be anything."""
    return "" if value is None else str(value)[:_LONGEST]


def _dice(value: Any) -> str:
    """`?` for what is no number."""
    if value is None:
        return ""
    return f"{value:.3f}" if type(value) in (int, float) else "?"


@app.command("export")
def state_export(
    federation: str,
    site: str,
    out: Annotated[Path, typer.Argument(help="File to write: the pair of shared and personal tensors.")],
    root: StateRoot = None,
    kit: Kit = None,
    fingerprint: Fingerprint = "",
    bundle: Bundle = None,
    force: Force = False,
) -> None:
    """Write a site's model without the optimiser's moments. It holds personal tensors: keep it at the site."""
    from pfedsam.storage.site_model import read, write
    from pfedsam.storage.state_files import described

    file = _one(_found(federation, site, _where(root, kit), fingerprint, bundle)).file
    require_free(out, force, keep=file.parent.iterdir())
    console.print(described(file), highlight=False, soft_wrap=True)
    model = read(file)
    model.moments = {}
    write(out, model)
    line = f"{out} written: round {model.info.get('round')}, {len(model.personal)} personal tensors"
    console.print(line, soft_wrap=True)


@app.command("delete")
def state_delete(
    federation: str,
    site: str,
    root: StateRoot = None,
    kit: Kit = None,
    fingerprint: Fingerprint = "",
    bundle: Bundle = None,
    every: Annotated[bool, typer.Option("--all", help="All states of this site in this federation.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a site's state for good, for example when it leaves a federation."""
    from pfedsam.storage.state_list import delete_state

    entries = _found(federation, site, _where(root, kit), fingerprint, bundle)
    chosen = entries if every else [_one(entries)]
    if not yes:
        folders = "\n".join(str(entry.folder) for entry in chosen)
        typer.confirm(f"{folders}\nDelete for good?", abort=True)
    for entry in chosen:
        delete_state(entry)
        console.print(f"deleted {entry.folder}", soft_wrap=True)


def _where(root: Path | None, kit: Path | None) -> Path:
    """The state root by one of the two options, else by the environment.

    Raises:
        PFedSAMError: E13 if a root that is named is none, or cannot be looked for, or if the kit names none: nothing
            is said of states then.
    """
    from pfedsam.storage.state import ROOT_VARIABLE, state_root

    if kit is None:
        # only the default may be missing: nobody has named it
        named = state_root() if root is None else _of_run(root)
        return _required(named) if root is not None or os.environ.get(ROOT_VARIABLE) else named
    if root is not None:
        raise typer.BadParameter("give one of --root and --kit", param_hint="--kit")
    from pfedsam.federated.settings import SITE_SETTINGS, read_settings

    path = kit / "local" / SITE_SETTINGS
    if not path.is_file():
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS,
            f"there is no {path}.",
            "Make the kit ready with `pfedsam site init`, or use --root.",
        )
    configured_root = read_settings(path).state_root
    if not configured_root:
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE,
            f"{path} names no state_root: the user that the service runs as keeps the state in its own home, or where "
            f"its {ROOT_VARIABLE} says, so what states there are is not known.",
            "Say where to look: --root <folder>, which is ~/.pfedsam of that user by default.",
        )
    return _required(state_root(configured_root))


def _of_run(root: Path) -> Path:
    """The state root in the folder of a simulation, or the root as it is."""
    inner = root / "state"
    # asked so that what may not be looked at is left to the next step
    return inner if os.path.isfile(root / TERMS_FILE) and os.path.isdir(inner) else root


def _required(root: Path) -> Path:
    try:
        if stat.S_ISDIR(root.stat().st_mode):
            return root
        problem = "is no folder"
    except OSError as error:
        problem = f"cannot be looked at ({error.strerror})"
    raise PFedSAMError(
        ErrorCode.PERSONAL_STATE,
        f"the state root {root} {problem}, so what states there are is not known.",
        "See that the disk is there, and call it as the user that the site runs as.",
    )


def _nothing(where: Path) -> str:
    return (
        f"no state under {where}. A site keeps it where its settings say: --kit <startup kit>; "
        "or say where to look: --root <folder>."
    )


def _found(federation: str, site: str, where: Path, fingerprint: str, bundle: str | None) -> list[StateEntry]:
    """The states that are meant, at least one."""
    from pfedsam.storage.state_list import list_states

    entries = list_states(where)
    matches = [
        entry
        for entry in entries
        if (entry.federation, entry.site) == (federation, site)
        and entry.fingerprint.startswith(fingerprint[: len(entry.fingerprint)])
        and bundle in (None, entry.bundle)
    ]
    if matches:
        return matches
    if not entries:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, _nothing(where))
    known = sorted({f"{entry.federation} {entry.site} ({entry.bundle}-{entry.fingerprint})" for entry in entries})
    raise PFedSAMError(
        ErrorCode.PERSONAL_STATE,
        f"no state of site '{site}' in federation '{federation}' with this bundle and fingerprint under {where}.",
        f"There are: {', '.join(known)}. Take the words of one of them, or look elsewhere with --kit or --root.",
    )


def _one(entries: list[StateEntry]) -> StateEntry:
    if len(entries) > 1:
        names = ", ".join(f"{entry.bundle}-{entry.fingerprint}" for entry in entries)
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE,
            f"{len(entries)} states of site '{entries[0].site}' in federation '{entries[0].federation}': {names}.",
            "Choose one with --fingerprint or --bundle (`delete` also takes --all).",
        )
    return entries[0]
