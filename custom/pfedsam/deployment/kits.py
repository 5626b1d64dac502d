"""Startup kits made ready: what a site, or the server, allows, in the files that NVFlare reads.

| file in `local/` | what it says |
|---|---|
| `pfedsam.json` | data, state, device, agreed federations; no job can change it |
| `resources.json` | exactly the classes of our jobs; no log streaming |
| `privacy.json` | our outgoing filter on every task of every job |
| `authorization.json` | no code in jobs; who may submit |

A file that is there is taken as it is, and only what is said here is set in it: what was added by hand stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_IMODE, S_IRUSR, S_IRWXG, S_IRWXO, S_IWUSR
from typing import Any

from nvflare.security.security import COMMAND_CATEGORIES, CommandCategory

from pfedsam.deployment.allowed_classes import KIT_FILES, needed_classes
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.log_streaming import LOG_SENDERS
from pfedsam.federated.settings import KIT_DEFAULTS, SITE_SETTINGS, SiteSettings, read_settings
from pfedsam.files import write_like
from pfedsam.parameters import GROUPS
from pfedsam.storage.job_plan import CLIENT, SERVER

RESOURCES, PRIVACY, AUTHORIZATION = "resources.json", "privacy.json", "authorization.json"
FILTER = "pfedsam.federated.filters.PersonalisedFilter"
SCOPE = "pfedsam"
#: Commands of an administrator that read files of the site.
SHELL = tuple(name for name, category in COMMAND_CATEGORIES.items() if category == CommandCategory.SHELL_COMMANDS)
#: What a role keeps whose rights are one word (or list) for all of them.
_OPERATIONS = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate")
#: Commands that NVFlare has in no category, so nobody has them whose rights are by category; each goes with a category.
#: The first tells NVFlare's version. The second is asked of the server: its own log of a job, which is a part of what
#: `download_job` fetches, and the sites' logs, which our kits do not send.
_WITH_VIEW, _WITH_DOWNLOAD = "report_version", "get_job_log"
#: What only the owner may read: private keys, and the contexts of `--encrypt`, which hold one.
_SECRETS = ("*.key", "*.tenseal")
_SILENT_SECONDS = 120
_LONGEST_VALUE = 120


@dataclass(frozen=True)
class PolicyFile:
    """A file that `init_kit` has looked after.

    Attributes:
        path: of the file; the one before it is kept as `<name>.before`, `<name>.before-2` ... if something has changed.
        changes: one line for each thing that is another than before; None if the file is new.
    """

    path: Path
    changes: tuple[str, ...] | None


def is_server(kit: Path) -> bool:
    """Whether a startup kit is a server's.

    Raises:
        PFedSAMError: E01 if the folder is neither a server's nor a site's startup kit.
    """
    for name, server in zip(KIT_FILES, (True, False), strict=True):
        if (kit / "startup" / name).is_file():
            return server
    raise PFedSAMError(
        ErrorCode.SITE_SETTINGS,
        f"{kit} is no startup kit of a site or a server.",
        "Give the folder that holds startup/ and local/.",
    )


def init_kit(kit: Path, settings: SiteSettings, *, byoc: bool = False) -> list[PolicyFile]:
    """Write the policy of a site or a server, or bring it up to date.

    Args:
        kit: folder of the startup kit, as provisioned.
        settings: of the site: what is set in them replaces what the site's file says, the rest of it stays, and what
            neither says is that of `KIT_DEFAULTS`. A server keeps its job store inside the kit and needs no settings.
        byoc: let jobs carry code. Such code runs with the rights of the site's process: no filter stops it.

    Returns:
        The files, with what changed in each; also private keys that others could read, whose mode is 0600 now.

    Raises:
        PFedSAMError: E01 if it is no startup kit, a file that is there cannot be read, or the settings name a
            parameter group that does not exist; nothing is written then. Also if a file cannot be written; it is as
            before then.
    """
    server, local = is_server(kit), kit / "local"
    files: dict[str, Any] = {
        RESOURCES: _resources(kit, server),
        AUTHORIZATION: _authorization(local, byoc, server),
    }
    if not server:
        files[PRIVACY] = _privacy(_load(local / PRIVACY, {}))
        before = read_settings(local / SITE_SETTINGS)
        given = settings.model_dump(exclude_unset=True, exclude_none=True)
        missing = {key: value for key, value in KIT_DEFAULTS.items() if key not in before.model_fields_set}
        new_settings = before.model_copy(update={**missing, **given})
        unknown = sorted(set(new_settings.may_share or ()) - set(GROUPS))
        if unknown:
            raise PFedSAMError(
                ErrorCode.SITE_SETTINGS,
                f"there are no parameter groups {unknown} to share.",
                f"Some of {list(GROUPS)}.",
            )
        files[SITE_SETTINGS] = new_settings.model_dump(mode="json", exclude_unset=True)
    return [*_close_secrets(kit), *(_write(local / name, content) for name, content in files.items())]


def open_secrets(kit: Path) -> list[Path]:
    """Private keys of a kit that others than the owner may read; copied kits often lose their modes."""
    paths = (path for pattern in _SECRETS for path in sorted((kit / "startup").glob(pattern)))
    return [path for path in paths if path.stat().st_mode & (S_IRWXG | S_IRWXO)]


def _close_secrets(kit: Path) -> Iterator[PolicyFile]:
    for path in open_secrets(kit):
        before = S_IMODE(path.stat().st_mode)
        path.chmod(S_IRUSR | S_IWUSR)
        yield PolicyFile(path, (f"mode: {before:04o} -> 0600",))


def outgoing(scope: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The filters of a site's privacy scope that its results go through, in their order."""
    filters = scope.get("task_result_filters") or ()
    return [filter_ for filter_ in filters if str(filter_.get("direction") or "out").lower() != "in"]


def _load(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else default
    except (OSError, ValueError) as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{path} could not be read: {error}.", "Mend it, or move it away."
        ) from None


def _resources(kit: Path, server: bool) -> dict[str, Any]:
    path = kit / "local" / RESOURCES
    default = path.with_name(f"{RESOURCES}.default")
    resources = _load(path, None) or _load(default, {})
    resources["class_allow_list"] = needed_classes(SERVER if server else CLIENT)
    resources["class_list_enforcement_mode"] = "enforce"
    resources["allow_log_streaming"] = False
    resources["components"] = [
        component
        for component in resources.get("components", [])
        if component["path"].rsplit(".", 1)[-1] not in LOG_SENDERS
    ]
    if server and not path.exists():
        # a site that is silent for so long counts as gone; a cut of a minute is survived
        resources["servers"][0]["heart_beat_timeout"] = _SILENT_SECONDS
    return _with_storage(resources, kit) if server else resources


def _with_storage(resources: dict[str, Any], kit: Path) -> dict[str, Any]:
    """Jobs and snapshots inside the kit, not in a folder that all servers of a machine share."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit.resolve() / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit.resolve() / "jobs")
    return resources


def _authorization(local: Path, byoc: bool, server: bool) -> dict[str, Any]:
    """Rights of each role: what is there, without code in jobs (or with it, as NVFlare's default gives it)."""
    single = {_WITH_VIEW: "view"} | ({_WITH_DOWNLOAD: "download_job"} if server else {})
    default = _load(local / f"{AUTHORIZATION}.default", {"permissions": {}})
    policy = _load(local / AUTHORIZATION, default)
    permissions = {}
    for role, given in policy["permissions"].items():
        rights = given if isinstance(given, dict) else dict.fromkeys(_OPERATIONS, given)
        first = default["permissions"].get(role, {})
        code = first.get("byoc", "none") if isinstance(first, dict) else first
        closed = {"byoc": code if byoc else "none", "shell_commands": "none", "server-predeployed-flwr": "none"}
        # a single command may be named beside its category
        closed |= {name: "none" for name in SHELL if name in rights}
        beside = {command: rights[category] for command, category in single.items() if category in rights}
        permissions[role] = {**beside, **rights, **closed}
    return {**policy, "permissions": permissions}


def _privacy(privacy: dict[str, Any]) -> dict[str, Any]:
    """Our filter as the first outgoing one of every scope, because a job may name any of them; ours by default."""
    scopes = list(privacy.get("scopes") or ())
    if SCOPE not in [scope.get("name") for scope in scopes]:
        scopes.insert(0, {"name": SCOPE, "properties": {}, "task_result_filters": [], "task_data_filters": []})
    for scope in scopes:
        others = [filter_ for filter_ in scope.get("task_result_filters") or () if filter_.get("path") != FILTER]
        scope["task_result_filters"] = [{"path": FILTER}, *others]
    return {**privacy, "scopes": scopes, "default_scope": SCOPE}


def _write(path: Path, content: Any) -> PolicyFile:
    """There is a whole policy at every moment: without a file NVFlare would take its own default, which allows more."""
    before = _load(path, None)
    changes = tuple(_changes(before, content))
    text = (json.dumps(content, indent=2) + "\n").encode()
    try:
        if before is None:
            write_like(path, text, path.parent)
        elif changes:
            keep_before(path)
            write_like(path, text, path)
    except OSError as error:
        remedy = "Free some disk space, or see whose folder it is; then call it again."
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{path} could not be written: {error}; it is as before.", remedy
        ) from None
    return PolicyFile(path, None if before is None else changes)


def keep_before(path: Path) -> None:
    """Keep a file that is to be changed as `<name>.before`, later ones as `<name>.before-2` and so on, with its mode.

    Raises:
        OSError: if it cannot be written.
    """
    write_like(_free(path.with_name(path.name + ".before")), path.read_bytes(), path)


def _free(path: Path) -> Path:
    """The first name that no file has: the first one kept is what there was before us."""
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 10_000)))
    return next(name for name in names if not name.exists())


def _changes(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """What differs between two JSON values, one line for each key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list):
        yield from (f"{where}: added {_short(item)}" for item in new if item not in old)
        yield from (f"{where}: removed {_short(item)}" for item in old if item not in new)
        if old != new and all(item in old for item in new) and all(item in new for item in old):
            yield f"{where}: in another order"
    elif old != new:
        yield f"{where}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
