"""Whose files are they? Nothing that this software did not write is deleted or overwritten without `--force`.

A folder that a command fills holds the marker file `.pfedsam.json`; a folder without it that is not empty is somebody
else's. A single file that is there already is never replaced without `--force`: nobody can tell who wrote it.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pfedsam
from pfedsam.errors import PFedSAMError
from pfedsam.files import write_atomically

MARKER = ".pfedsam.json"


def marker(folder: Path) -> dict[str, Any] | None:
    """What the marker of a folder says, None if there is none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def require_ours(folder: Path, what: str, force: bool = False) -> None:
    """Make sure that a command may write into a folder, and delete what is in it.

    Args:
        folder: may be missing.
        what: the kind of folder, as in its marker, for example `simulation`.
        force: whether a folder of somebody else may be used, too.

    Raises:
        PFedSAMError: E24 if it is a file, holds something and has no marker, or has the marker of another kind.
    """
    if folder.is_symlink() and not folder.exists():
        raise PFedSAMError("E24", f"{folder} is a link to nothing.", "Choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise PFedSAMError("E24", f"{folder} is a file, a folder was expected.", "Choose another folder.")
    if force or not folder.is_dir() or not any(folder.iterdir()):
        return
    found = (marker(folder) or {}).get("what")
    if found == what:
        return
    told = f"is a folder of another kind ('{found}', not '{what}')" if found else "holds files that are not ours"
    raise PFedSAMError("E24", f"{folder} {told}.", "Choose another folder, or give --force to write into this one.")


def claim(folder: Path, what: str, force: bool = False) -> None:
    """Make a folder and put the marker into it; one that has the marker of this kind is left as it is.

    Raises:
        PFedSAMError: E24, see `require_ours`.
        OSError: if it cannot be written.
    """
    require_ours(folder, what, force)
    if (marker(folder) or {}).get("what") == what:
        return
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"what": what, "made": made, "by": f"pfedsam {pfedsam.__version__}"}
    write_atomically(folder / MARKER, f"{json.dumps(content)}\n".encode())


def require_free(path: Path, force: bool = False) -> None:
    """Make sure that a file may be written.

    Raises:
        PFedSAMError: E24 if there is something already, and it is not to be replaced.
    """
    if path.is_dir():
        raise PFedSAMError("E24", f"{path} is a folder, a file was expected.", "Choose another name.")
    if not force and (path.exists() or path.is_symlink()):
        raise PFedSAMError("E24", f"{path} is there already.", "Choose another name, or give --force to replace it.")
