"""The files of a site's state, what each tells of itself, and which of them a job goes on from."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.errors import PFedSAMError
from pfedsam.storage.site_model import SiteModel, read

CURRENT, PREVIOUS, LOCK = "state.safetensors", "previous.safetensors", "lock"
#: The state with the best validation Dice so far, for people: no job goes on from it.
BEST = "best.safetensors"
#: What is put in the place of another file in one step.
BACKUP, NEW_BEST = f".{PREVIOUS}", f".{BEST}"
#: What a write that was killed has left.
HALF_WRITTEN = (f".{CURRENT}.*.tmp", f".{BACKUP}.*.tmp", f".{NEW_BEST}.*.tmp")
#: Whatever holds tensors of a site.
HOLD_TENSORS = (CURRENT, PREVIOUS, BEST, BACKUP, NEW_BEST, *HALF_WRITTEN)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def told_dice(info: Mapping[str, Any]) -> float | None:
    """The validation Dice of a state: of the personal model, else of the global one it stands beside, else None."""
    for key in ("val_dice_personal", "val_dice_global"):
        value = info.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def described(path: Path) -> str:
    """Which of a site's models a file is, for the line that a command prints; a file of another name is a model.

    Raises:
        PFedSAMError: E13 if it cannot be read.
    """
    info = read(path).info
    kind = {CURRENT: "current state", PREVIOUS: "state before the last", BEST: "best state"}.get(path.name, "model")
    text = f"{path}: {kind} of {_round_and_dice(info)}"
    best = path.with_name(BEST)
    other = info_of(best) if path.name == CURRENT else {}
    return f"{text}; {BEST} beside it is of {_round_and_dice(other)}" if other else text


def _round_and_dice(info: Mapping[str, Any]) -> str:
    dice, number = told_dice(info), info.get("round")
    when = "a training alone" if number is None else f"round {number}{' (final)' if info.get('final') else ''}"
    return f"{when}, validation Dice {'not known' if dice is None else f'{dice:.3f}'}{_served(info.get('served'))}"


def _served(served: Any) -> str:
    """What the site has chosen to keep after its final phase, if it chose; see `pfedsam.training.cross_fit`."""
    if not isinstance(served, Mapping):
        return ""
    if not served.get("epochs"):
        return "; it is the global model: no personal one was surely better on this site's patients"
    try:
        kept = f"kept {served['alpha']:.0%} of the personal model after {served['epochs']} epoch(s)"
        gain = f"{served['gain']:+.3f} (standard error {served['error']:.3f})"
        return f"; {kept}, Dice {gain} on {served['patients']} patients left out"
    except (KeyError, TypeError, ValueError):
        return ""


def info_of(path: Path) -> dict[str, Any]:
    """What a state tells of itself; nothing if it is not there or cannot be read."""
    try:
        return read(path).info
    except PFedSAMError:
        return {}


def last_readable(folder: Path) -> tuple[Path, SiteModel | None, PFedSAMError | None]:
    """The file that a job goes on from, its model if there is one, and why the current file is not it."""
    problem: PFedSAMError | None = None
    for path in (folder / CURRENT, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            return path, read(path), problem
        except PFedSAMError as error:
            problem = problem or error
    return folder / CURRENT, None, problem


def is_readable(path: Path) -> bool:
    """Whether a file of a state is whole."""
    try:
        read(path)
    except PFedSAMError:
        return False
    return True


def remedy_for(error: OSError) -> str:
    """What helps when a file of a state could not be written or deleted."""
    if error.errno in _FULL:
        return "Free some disk space."
    if error.errno in _DENIED:
        return "See that this user may write there: owner, mode, how the disk is mounted."
    return "Look at the disk and how it is mounted."
