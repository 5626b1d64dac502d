"""The state of a site on its own disk: `<root>/<federation>/<site>/<bundle>-<fingerprint>/`.

It lies outside every NVFlare workspace, because the simulator empties its workspace at the start, and is keyed by the
federation, not by the job, so that a job submitted again finds it. Folders have mode 0700 and files 0600.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_atomically
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, require_finite, write
from pfedsam.storage.state_files import (
    BACKUP,
    BEST,
    CURRENT,
    HALF_WRITTEN,
    LOCK,
    NEW_BEST,
    PREVIOUS,
    info_of,
    is_readable,
    last_readable,
    remedy_for,
    told_dice,
)
from pfedsam.training.strategy import Strategy

logger = logging.getLogger(__name__)

ROOT_VARIABLE = "PFEDSAM_STATE_ROOT"


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
            for path in (path for pattern in HALF_WRITTEN for path in self.folder.glob(pattern)):
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
        current, previous, backup = (self.folder / name for name in (CURRENT, PREVIOUS, BACKUP))
        try:
            backup.unlink(missing_ok=True)
            keep = current.exists() and (self._whole or is_readable(current))
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
                remedy_for(error),
            ) from None
        try:
            self._keep_best(model.info)
        except OSError as error:  # no reason to lose the round
            logger.warning("%s could not be written: %s. %s", self.folder / BEST, error, remedy_for(error))

    def _keep_best(self, info: Mapping[str, Any]) -> None:
        """Keep the current file as the best one, too, if it is."""
        best, new, dice = self.folder / BEST, self.folder / NEW_BEST, told_dice(info)
        if dice is None:
            return
        if self._best is None:
            self._best = told_dice(info_of(best)) or 0.0
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
        path, model, problem = last_readable(self.folder)
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
