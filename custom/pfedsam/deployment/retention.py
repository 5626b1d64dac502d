"""What a site removes after a while: folders of finished jobs and rotated logs, which name cases.

What left the site in a job is kept: `<kit>/audit/<job>/` holds the records of our filter, NVFlare's audit log of the
job, its configuration, and the whole audit as it was then (`audit.json`). `pfedsam audit <kit>/audit <job>` reads them.
The site's own `audit.log` is never touched.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pfedsam.deployment.audit import audit
from pfedsam.deployment.kits import is_server
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.records import SENT_FILE

#: Folder in the kit, and what is kept of each job.
KEPT, AUDIT_FILE = "audit", "audit.json"
_META = "meta.json"
_RECORDS = (_META, "audit.log", SENT_FILE, "app_*/config/*.json")
#: Rotated by NVFlare (a number) or by logrotate (a number or a date).
_ROTATED = ("log*.txt[.-]*", "error_log.txt[.-]*", "log.json[.-]*")
_DAY = 24 * 3600


@dataclass(frozen=True)
class Outdated:
    """Something that may be removed.

    Attributes:
        path: folder of a finished job, or a rotated log.
        days: since the newest file in it was written.
        bytes: of all files in it.
    """

    path: Path
    days: float
    bytes: int


def outdated(kit: Path, days: float) -> list[Outdated]:
    """Folders of finished jobs and rotated logs in which nothing was written for so many days.

    Args:
        kit: the site's startup kit, where NVFlare also writes.
        days: age of the newest file.

    Raises:
        PFedSAMError: E01 if it is no site's kit: a server's jobs are deleted in NVFlare's console.
    """
    if is_server(kit):
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{kit} is a server's kit.", "Delete its jobs in the console: delete_job <id>."
        )
    running = {word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()}
    candidates = [_measure(path) for path in [*_jobs(kit), *_rotated(kit)] if path.name not in running]
    return [candidate for candidate in candidates if candidate.days >= days]


def remove(kit: Path, one: Outdated) -> None:
    """Remove a rotated log, or a job's folder after its records were copied.

    Raises:
        PFedSAMError: E01 if the records cannot be kept or the folder cannot be removed.
    """
    try:
        if one.path.is_dir():
            _keep_records(kit, one.path)
            shutil.rmtree(one.path)
        else:
            one.path.unlink()
    except OSError as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{one.path} could not be removed: {error}.", "Whose files are they?"
        ) from None


def _jobs(kit: Path) -> Iterator[Path]:
    for path in sorted(kit.iterdir()):
        if path.is_dir() and not path.is_symlink() and ((path / _META).is_file() or _is_job_id(path.name)):
            yield path


def _is_job_id(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


def _rotated(kit: Path) -> list[Path]:
    return sorted({path for pattern in _ROTATED for path in kit.glob(pattern) if path.is_file()})


def _measure(path: Path) -> Outdated:
    # a folder itself is touched whenever something in it is removed
    files = [file for file in path.rglob("*") if not file.is_dir()] or [path]
    stats = [file.lstat() for file in files]
    newest = max(stat.st_mtime for stat in stats)
    return Outdated(path, (time.time() - newest) / _DAY, sum(stat.st_size for stat in stats))


def _keep_records(kit: Path, job: Path) -> None:
    target = kit / KEPT / job.name
    if target.exists():
        # an earlier call was interrupted after this
        return
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.name}.", dir=target.parent) as scratch:
        whole = Path(scratch) / job.name
        whole.mkdir()
        for path in (path for pattern in _RECORDS for path in job.glob(pattern)):
            copy = whole / path.relative_to(job)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        (whole / AUDIT_FILE).write_text(json.dumps(_audit(kit, job.name), indent=1) + "\n")
        whole.rename(target)


def _audit(kit: Path, job: str) -> dict[str, Any]:
    """The audit, or why there is none: records that nobody can read do not keep a folder for ever."""
    try:
        return audit(kit, job).to_dict()
    except (PFedSAMError, LookupError, ValueError) as error:
        return {"job": job, "problems": [f"the audit failed with {type(error).__name__}: {error}"]}
