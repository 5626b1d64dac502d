"""The state of a site on its own disk: `<root>/<federation>/<site>/<bundle>-<fingerprint>/`.

It lies outside every NVFlare workspace, because the simulator empties its workspace at the start, and is keyed by the
federation, not by the job, so that a job submitted again finds it. Folders have mode 0700 and files 0600.
"""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_atomically
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, read, require_finite, write
from pfedsam.training.strategy import Strategy

logger = logging.getLogger(__name__)

ROOT_VARIABLE = "PFEDSAM_STATE_ROOT"
CURRENT, PREVIOUS, LOCK = "state.safetensors", "previous.safetensors", "lock"
#: The state with the best validation Dice so far, for people: no job goes on from it.
BEST = "best.safetensors"
_BACKUP, _NEW_BEST = f".{PREVIOUS}", f".{BEST}"
#: What a write that was killed has left.
_HALF_WRITTEN = (f".{CURRENT}.*.tmp", f".{_BACKUP}.*.tmp", f".{_NEW_BEST}.*.tmp")
#: Whatever holds tensors of a site.
_HOLD_TENSORS = (CURRENT, PREVIOUS, BEST, _BACKUP, _NEW_BEST, *_HALF_WRITTEN)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def state_root(site_setting: str | None = None) -> Path:
    """The root of all state: the site's settings file, else the environment variable, else `~/.pfedsam`."""
    return Path(site_setting or os.environ.get(ROOT_VARIABLE) or Path.home() / ".pfedsam").expanduser()


class SiteState:
    """The state folder of one site in one federation, for one bundle on one set of base weights.

    Args:
        root: see `state_root`.
        federation: name of the federation.
        site: name of the site.
        bundle: name of the bundle.
        fingerprint: of the base weights and the network's settings.
    """

    def __init__(self, root: Path, federation: str, site: str, bundle: str, fingerprint: str) -> None:
        self.folder = root / federation / site / f"{bundle}-{fingerprint[:12]}"
        self.fingerprint = fingerprint
        self._lock = FileLock(self.folder / LOCK, timeout=0)
        #: Whether the current file was read or written here, so that it may take the place of the one before it.
        self._whole = False
        #: Validation Dice of the best state so far, None before it was looked for.
        self._best: float | None = None

    def open(self) -> None:
        """Create the folder, take its lock, and remove what a write that was killed has left.

        Raises:
            PFedSAMError: E14 if another job holds the lock, E13 if the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.folder.parent, self.folder.parent.parent):
                folder.chmod(0o700)
            self._lock.acquire()
            for path in (path for pattern in _HALF_WRITTEN for path in self.folder.glob(pattern)):
                path.unlink()
        except Timeout:
            raise PFedSAMError(
                ErrorCode.STATE_IN_USE,
                f"another job works on {self.folder}.",
                "Wait for it or abort it; the lock goes with its process. A second federation needs another name.",
            ) from None
        except OSError as error:
            raise PFedSAMError(
                ErrorCode.PERSONAL_STATE,
                f"the state folder {self.folder} cannot be written: {error}.",
                f"Set {ROOT_VARIABLE}.",
            ) from None

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def save(self, model: SiteModel) -> None:
        """Write the state atomically; the last one, if it is readable, is kept as `previous.safetensors`.

        A state with a validation Dice (see `told_dice`) that is as good as the best one's is kept as `best.safetensors`
        too. The Dice of all rounds and jobs are compared as they are, also if the validation cases have changed.

        Raises:
            PFedSAMError: E13 if it cannot be written or holds values that are not finite; the last state is intact
                then.
        """
        require_finite(model, f"the state for {self.folder}")
        current, previous, backup = (self.folder / name for name in (CURRENT, PREVIOUS, _BACKUP))
        try:
            backup.unlink(missing_ok=True)
            keep = current.exists() and (self._whole or _readable(current))
            if keep:
                _keep(current, backup)
            write(current, model)
            self._whole = True
            if keep:
                os.replace(backup, previous)
        except OSError as error:
            raise PFedSAMError(
                ErrorCode.PERSONAL_STATE,
                f"{current} could not be written: {error}; the last state is intact.",
                _remedy(error),
            ) from None
        try:
            self._keep_best(model.info)
        except OSError as error:  # no reason to lose the round
            logger.warning("%s could not be written: %s. %s", self.folder / BEST, error, _remedy(error))

    def _keep_best(self, info: Mapping[str, Any]) -> None:
        """Keep the current file as the best one, too, if it is."""
        best, new, dice = self.folder / BEST, self.folder / _NEW_BEST, told_dice(info)
        if dice is None:
            return
        if self._best is None:
            self._best = told_dice(_info(best)) or 0.0
        if dice >= self._best:
            new.unlink(missing_ok=True)
            _keep(self.folder / CURRENT, new)
            os.replace(new, best)
            self._best = dice

    def load(self) -> SiteModel | None:
        """The last state, the one before if the last is damaged, or None if there is none.

        Raises:
            PFedSAMError: E13 if there are files but none is readable, E11 if the state is of other base weights.
        """
        path, model, problem = _last(self.folder)
        if model is None and problem is not None:
            raise problem
        if problem is not None:
            logger.error("%s Trying the state before it.", problem)
        if model is not None and model.info.get("fingerprint") != self.fingerprint:
            raise PFedSAMError(
                ErrorCode.OTHER_BASE_WEIGHTS, f"{path} belongs to other base weights.", "Move it away, or use them."
            )
        self._whole = model is not None and path.name == CURRENT
        return model

    def require_same_kind(self, saved: SiteModel, strategy: Strategy) -> None:
        """Refuse to go on from a state in which another strategy keeps other tensors: it would be overwritten.

        A strategy of another name that keeps the same is let through. One that makes its copy of the shared tensors in
        the final phase has none before.

        Args:
            saved: what `load` has found.
            strategy: of the job.

        Raises:
            PFedSAMError: E13 naming the folder and both strategies.
        """
        name, had, has = saved.info.get("strategy"), bool(saved.copy), strategy.has_copy
        same_copy = had == has or (has and name == strategy.name)
        if _groups(saved.roles) == _groups(strategy.roles) and same_copy:
            return
        federation, site = self.folder.parts[-3:-1]
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE,
            f"{self.folder} holds a state of strategy '{name}' ({_told(saved.roles, had)}), the job is of "
            f"'{strategy.name}' ({_told(strategy.roles, has)}).",
            f"Take another federation name, or `pfedsam state delete {federation} {site}`.",
        )


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
    other = _info(best) if path.name == CURRENT else {}
    return f"{text}; {BEST} beside it is of {_round_and_dice(other)}" if other else text


def _round_and_dice(info: Mapping[str, Any]) -> str:
    dice, number = told_dice(info), info.get("round")
    when = "a training alone" if number is None else f"round {number}{' (final)' if info.get('final') else ''}"
    return f"{when}, validation Dice {'not known' if dice is None else f'{dice:.3f}'}"


def _info(path: Path) -> dict[str, Any]:
    """What a state tells of itself; nothing if it is not there or cannot be read."""
    try:
        return read(path).info
    except PFedSAMError:
        return {}


def _last(folder: Path) -> tuple[Path, SiteModel | None, PFedSAMError | None]:
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


def _groups(roles: Roles) -> tuple[set[str], set[str]]:
    return set(roles.shared), set(roles.personal)


def _told(roles: Roles, copy: bool) -> str:
    return f"shared {sorted(roles.shared)}, personal {sorted(roles.personal)}{', a copy of the shared' if copy else ''}"


def _keep(current: Path, backup: Path) -> None:
    """Keep the current state under another name; it stays in its place, so there is a valid one at every moment."""
    try:
        os.link(current, backup)
    except OSError:  # some file systems have no hard links
        write_atomically(backup, current.read_bytes())


def _remedy(error: OSError) -> str:
    if error.errno in _FULL:
        return "Free some disk space."
    if error.errno in _DENIED:
        return "See that this user may write there: owner, mode, how the disk is mounted."
    return "Look at the disk and how it is mounted."


def _readable(path: Path) -> bool:
    try:
        read(path)
    except PFedSAMError:
        return False
    return True


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
    readable = [one for one in list_states(root) if one.federation == federation and one.info]
    return {one.site: one for one in sorted(readable, key=_progress)}


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
    return any(fnmatch.fnmatchcase(path.name, pattern) for path in _content(folder) for pattern in _HOLD_TENSORS)


def _hidden(folder: Path, error: OSError) -> PFedSAMError:
    return PFedSAMError(
        ErrorCode.PERSONAL_STATE,
        f"{folder} cannot be looked into ({error.strerror}), so what states it holds is not known.",
        "Call it as the user that the site runs as, or as the administrator of the machine.",
    )


def _entry(folder: Path) -> StateEntry:
    try:
        path, model, error = _last(folder)
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
    return StateEntry(*names, folder, path, info, problem, _info(folder / BEST))


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
            f"{_remedy(error)} Then delete it again.",
        ) from None
