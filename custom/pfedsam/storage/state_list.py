"""The states under a root: listed, the newest of each site, and deleted for good."""

from __future__ import annotations

import fnmatch
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.state_files import BEST, HOLD_TENSORS, LOCK, PREVIOUS, info_of, last_readable, remedy_for


@dataclass(frozen=True)
class StateEntry:
    """One state on disk, as `pfedsam state list` shows it.

    Attributes:
        federation, site, bundle: what it belongs to.
        fingerprint: the first twelve digits.
        folder: of the state.
        file: what a job goes on from: the current state, or the one before it.
        info: of that file; empty if none is readable.
        problem: what is wrong with the current file.
        best: what the best state so far tells of itself; empty if there is none.
    """

    federation: str
    site: str
    bundle: str
    fingerprint: str
    folder: Path
    file: Path
    info: dict[str, Any]
    problem: str = ""
    best: dict[str, Any] = field(default_factory=dict)


def list_states(root: Path) -> list[StateEntry]:
    """All states under a root, sorted by federation, site and bundle; also those that no job can go on from.

    Raises:
        PFedSAMError: E13 if a folder may not be looked into: whether it holds a state is not known then.
    """
    sites = (site for federation in _content(root) for site in _content(federation))
    folders = (folder for site in sites for folder in _content(site))
    return [_entry(folder) for folder in sorted(folders) if _holds_tensors(folder)]


def newest_states(root: Path, federation: str) -> dict[str, StateEntry]:
    """The readable state of each site that has come farthest: another backbone or image size has one of its own.

    The round counts, then whether the final phase is done. Only where both are equal the clock decides: a copy of a
    backup is new by the clock.
    """
    readable = [entry for entry in list_states(root) if entry.federation == federation and entry.info]
    return {entry.site: entry for entry in sorted(readable, key=_progress)}


def _progress(entry: StateEntry) -> tuple[int, bool, float]:
    number = entry.info.get("round")
    return number if type(number) is int else -1, entry.info.get("final") is True, entry.file.stat().st_mtime


def _content(folder: Path) -> list[Path]:
    """What lies in a folder; nothing if it is none."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        # a link to a disk that is not there hides what it holds
        if isinstance(error, NotADirectoryError) or (isinstance(error, FileNotFoundError) and not folder.is_symlink()):
            return []
        raise _hidden(folder, error) from None


def _holds_tensors(folder: Path) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for path in _content(folder) for pattern in HOLD_TENSORS)


def _hidden(folder: Path, error: OSError) -> PFedSAMError:
    return PFedSAMError(
        ErrorCode.PERSONAL_STATE,
        f"{folder} cannot be looked into ({error.strerror}), so what states it holds is not known.",
        "Call it as the user that the site runs as, or as the administrator of the machine.",
    )


def _entry(folder: Path) -> StateEntry:
    try:
        path, model, error = last_readable(folder)
    except OSError as denied:
        raise _hidden(folder, denied) from None
    problem = error.message if error else ""
    if model is None and error is None:
        problem = f"{folder} holds nothing but a write that was interrupted."
    elif path.name == PREVIOUS:
        problem = f"{problem} The state before it is used.".strip()
    bundle, _, fingerprint = folder.name.rpartition("-")
    info = model.info if model else {}
    names = folder.parents[1].name, folder.parent.name, bundle, fingerprint
    return StateEntry(*names, folder, path, info, problem, info_of(folder / BEST))


def delete_state(entry: StateEntry) -> None:
    """Delete a state for good, with the one before it.

    Raises:
        PFedSAMError: E14 if a job works on it, E13 if it could not be deleted, or not all of it.
    """
    lock = FileLock(entry.folder / LOCK, timeout=0)
    try:
        with lock:
            shutil.rmtree(entry.folder)
        for folder in (entry.folder.parent, entry.folder.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()
    except Timeout:
        raise PFedSAMError(ErrorCode.STATE_IN_USE, f"a job works on {entry.folder}.", "Abort the job first.") from None
    except OSError as error:
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE,
            f"{entry.folder} is not deleted, or not all of it: {error}.",
            f"{remedy_for(error)} Then delete it again.",
        ) from None
