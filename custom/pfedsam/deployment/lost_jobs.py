"""Jobs that a server was running when it was lost: closed in its job store, which NVFlare's console cannot do.

NVFlare writes RUNNING when a job starts and its end when it ends. A server that was killed leaves the job RUNNING:
`abort_job` says that it is not running, `delete_job` that it is. Nothing of NVFlare looks at it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.storage import WORKSPACE
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

from pfedsam.deployment.kits import RESOURCES, is_server
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_object
from pfedsam.storage.global_model import round_of

#: What a closed job is called: NVFlare's own word for it.
CLOSED = RunStatus.ABANDONED.value
_INIT = "Make the kit ready with `pfedsam site init`."


@dataclass(frozen=True)
class LostJob:
    """A job that nobody runs, though the server's store says so.

    Attributes:
        job_id: of NVFlare.
        name: of the job.
        folder: its run folder at the server, None if there is none.
    """

    job_id: str
    name: str
    folder: Path | None

    def global_model(self) -> tuple[Path, int] | None:
        """The last global model that the server has saved and its round, or None."""
        found = sorted(self.folder.rglob("global_model.safetensors")) if self.folder else []
        return (found[0], round_of(found[0])) if found else None


def lost_jobs(kit: Path) -> list[LostJob]:
    """The jobs of a server that were running when it was lost, oldest first.

    A job is lost if the store says RUNNING, no process runs it, and no server of this kit runs that was there when the
    job started: such a server may still wait for what the sites say of its end.

    Args:
        kit: startup kit of the server, on this machine.

    Raises:
        PFedSAMError: E01 if it is no server's kit, or does not say where its jobs are; E22 if the store is another
            user's: what is written there by this one, the server could not read.
    """
    store, root = _store(kit)
    servers, commands = _processes(kit.resolve())
    found = []
    for uri in store.list_objects(str(root)) if root.is_dir() else ():
        meta = store.get_meta(uri)
        job_id = Path(uri).name
        if meta.get(JobMetaKey.STATUS.value) != RunStatus.RUNNING.value or any(job_id in one for one in commands):
            continue
        started = _started(meta)
        if any(began < started for began in servers):
            continue
        folder = kit.resolve() / job_id
        found.append((started, LostJob(job_id, str(meta.get("name", "")), folder if folder.is_dir() else None)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def close_jobs(kit: Path, job_ids: Iterable[str] | None = None) -> list[LostJob]:
    """Close lost jobs, so that the console calls them ended, and what they have left can be downloaded.

    The run folder stays as it is; a copy of it goes to the store, as NVFlare keeps that of a job that has ended.

    Args:
        kit: startup kit of the server, on this machine.
        job_ids: None for all that are lost.

    Returns:
        The jobs that were closed.

    Raises:
        PFedSAMError: as `lost_jobs`; E22 if a job that was named is not lost, and nothing is closed then.
    """
    lost = {job.job_id: job for job in lost_jobs(kit)}
    wanted = list(lost) if job_ids is None else list(dict.fromkeys(job_ids))
    store, root = _store(kit)
    for job_id in wanted:
        if job_id not in lost:
            raise PFedSAMError(ErrorCode.DEPLOYMENT, *_why_not(store, root, job_id))
    for job_id in wanted:
        uri, folder = str(root / job_id), lost[job_id].folder
        if folder is not None:
            store.update_object(uri, [str(folder)], WORKSPACE)
        store.update_meta(uri, {JobMetaKey.STATUS.value: CLOSED}, replace=False)
    return [lost[job_id] for job_id in wanted]


def _why_not(store: FilesystemStorage, root: Path, job_id: str) -> tuple[str, str]:
    known = [Path(uri).name for uri in store.list_objects(str(root))] if root.is_dir() else []
    if job_id not in known:
        return f"the server knows no job '{job_id}'.", "`list_jobs` in NVFlare's console names the jobs."
    status = store.get_meta(str(root / job_id)).get(JobMetaKey.STATUS.value)
    if status != RunStatus.RUNNING.value:
        return f"job {job_id} is {status}, so there is nothing to close.", "`list_jobs` names the jobs that run."
    return f"job {job_id} is run by this server.", "Stop it with `abort_job` in NVFlare's console."


def _store(kit: Path) -> tuple[FilesystemStorage, Path]:
    """NVFlare's store of jobs in a server's kit, and its folder."""
    if not is_server(kit):
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{kit} is a site's kit.", "Give the server's: it keeps the jobs.")
    path = kit / "local" / RESOURCES
    components = read_object(path, _INIT).get("components") or ()
    roots = [one.get("args", {}).get("uri_root") for one in components if one.get("id") == "job_manager"]
    if not roots or not isinstance(roots[0], str):
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{path} does not say where the server keeps its jobs.", _INIT)
    root = Path(roots[0])
    if root.is_dir() and root.stat().st_uid != os.geteuid():
        message = f"the jobs in {root} are of user {root.stat().st_uid}, this is user {os.geteuid()}."
        raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "Call it as the server's user (sudo -u).")
    return FilesystemStorage(), root


def _processes(kit: Path) -> tuple[list[datetime], list[str]]:
    """When the servers of a kit were started, and the command lines of everything of NVFlare that runs in it."""
    began, commands = [], []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        paths = (Path(word) for word in words if word.startswith("/"))
        if not any(word.startswith("nvflare.") for word in words) or all(path.resolve() != kit for path in paths):
            continue
        commands.append(" ".join(words))
        if any(word.endswith(".server_train") for word in words):
            began.append(datetime.fromtimestamp(process.info["create_time"], timezone.utc))
    return began, commands


def _started(meta: dict[str, Any]) -> datetime:
    """When a job started, by its metadata; long ago if they do not say."""
    try:
        started = datetime.fromisoformat(str(meta.get(JobMetaKey.START_TIME.value)))
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)
    return started if started.tzinfo else started.astimezone()
