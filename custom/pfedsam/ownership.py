"""Whose files are they? Nothing that this software did not write is deleted or overwritten without `--force`.

A folder that a command fills holds the marker file `.pfedsam.json`; a folder without it that is not empty is somebody
else's. A folder that a command replaces as a whole is sealed: its marker has the digest of every file, so that a file
that a person has changed or added is seen. A single file that is there already is never replaced without `--force`:
nobody can tell who wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pfedsam
from pfedsam.errors import ErrorCode, PFedSAMError, few
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
    _require_ours(folder, what, force, "Choose another folder, or give --force to write into this one.")


def _require_ours(folder: Path, what: str, force: bool, remedy: str) -> None:
    """See `require_ours`; with the remedy for a folder of somebody else."""
    if folder.is_symlink() and not folder.exists():
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{folder} is a link to nothing.", "Choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{folder} is a file, a folder was expected.", "Choose another folder.")
    if force or _is_empty(folder):
        return
    kind = (marker(folder) or {}).get("what")
    if kind == what:
        return
    problem = f"is a folder of another kind ('{kind}', not '{what}')" if kind else "holds files that are not ours"
    raise PFedSAMError(ErrorCode.NOT_OURS, f"{folder} {problem}.", remedy)


def claim(folder: Path, what: str, force: bool = False) -> None:
    """Make a folder and put the marker into it; one that has the marker of this kind is left as it is.

    By force a folder of somebody else is taken, with all that is in it.

    Raises:
        PFedSAMError: E24, see `require_ours`.
        OSError: if it cannot be written.
    """
    require_ours(folder, what, force)
    if (marker(folder) or {}).get("what") != what:
        _mark(folder, {"what": what})


def use(folder: Path, what: str, force: bool = False) -> None:
    """As `claim`, but a folder that is used by force stays whose it is: the next command asks again.

    Raises:
        PFedSAMError: E24, see `require_ours`.
        OSError: if it cannot be written.
    """
    require_ours(folder, what, force)
    if _is_empty(folder):
        _mark(folder, {"what": what})


def seal(folder: Path, what: str) -> None:
    """Put a marker with the digest of every file into a folder that was just written.

    Raises:
        OSError: if it cannot be written.
    """
    _mark(folder, {"what": what, "files": _digests(folder)})


def require_sealed(folder: Path, what: str, force: bool = False) -> None:
    """Make sure that a folder may be replaced: it is missing, empty, or as `seal` has left it.

    Raises:
        PFedSAMError: E24 if it is something else, naming files that were changed or added.
    """
    # by force, too, the caller may refuse what is no such folder
    _require_ours(folder, what, force, f"Choose another folder; --force replaces one that is a {what} folder.")
    if force or _is_empty(folder):
        return
    sealed = (marker(folder) or {}).get("files")
    sealed = sealed if isinstance(sealed, dict) else {}
    changed = [name for name, digest in _digests(folder).items() if sealed.get(name) != digest]
    if changed:
        raise PFedSAMError(
            ErrorCode.NOT_OURS,
            f"{folder} was changed since it was written: {few(changed)}.",
            "Move it away, or give --force to replace it.",
        )


def require_free(path: Path, force: bool = False, keep: Iterable[Path] = ()) -> None:
    """Make sure that a file may be written.

    Args:
        path: of the file.
        force: whether one that is there may be replaced.
        keep: files that are read: they are not replaced in any case.

    Raises:
        PFedSAMError: E24 if there is something already, and it is not to be replaced.
    """
    if path.is_dir():
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{path} is a folder, a file was expected.", "Choose another name.")
    if path.resolve() in {file.resolve() for file in keep}:
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{path} is read, so it cannot be written.", "Choose another name.")
    if not force and (path.exists() or path.is_symlink()):
        raise PFedSAMError(
            ErrorCode.NOT_OURS, f"{path} is there already.", "Choose another name, or give --force to replace it."
        )


def _is_empty(folder: Path) -> bool:
    """Whether a folder is missing or holds nothing but a marker that was cut off while it was written.

    Raises:
        PFedSAMError: E24 if it may not be looked into.
    """
    try:
        return not folder.exists() or all(path.match(f".{MARKER}.*.tmp") for path in folder.iterdir())
    except OSError as error:
        raise PFedSAMError(
            ErrorCode.NOT_OURS, f"{folder} cannot be looked into: {error}.", "Choose another folder."
        ) from None


def _mark(folder: Path, content: dict[str, Any]) -> None:
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    fields = {**content, "made": made, "by": f"pfedsam {pfedsam.__version__}"}
    write_atomically(folder / MARKER, f"{json.dumps(fields)}\n".encode())


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but the marker, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARKER)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
