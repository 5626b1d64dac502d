"""Startup kits made ready: what a site, or the server, allows, in the files that NVFlare reads.

| file in `local/` | what it says |
|---|---|
| `pfedsam.json` | data, state, device, agreed federations; no job can change it |
| `resources.json` | exactly the classes of our jobs; no log streaming |
| `privacy.json` | our outgoing filter on every task of every job |
| `authorization.json` | no code in jobs; who may submit |
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedsam.errors import PFedSAMError
from pfedsam.federated.jobs import needed_classes
from pfedsam.federated.settings import SITE_SETTINGS, SiteSettings

RESOURCES, PRIVACY, AUTHORIZATION = "resources.json", "privacy.json", "authorization.json"
FILTER = "pfedsam.federated.filters.PersonalisedFilter"
SCOPE = "pfedsam"
#: Components of NVFlare that send a site's log files to the server.
_LOG_SENDERS = ("SiteLogStreamer", "JobLogStreamer", "JobLogReceiver")
#: A certificate that expires sooner is a problem.
_EXPIRES_SOON_DAYS = 30
_SILENT_SECONDS = 120
_LEAST_DISK_GIB, _LEAST_MEMORY_GIB = 5, 4
_CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """One line of `pfedsam site check`."""

    name: str
    fine: bool
    message: str


def is_server(kit: Path) -> bool:
    """Whether a startup kit is a server's.

    Raises:
        PFedSAMError: E01 if the folder is neither a server's nor a site's startup kit.
    """
    for name, server in (("fed_server.json", True), ("fed_client.json", False)):
        if (kit / "startup" / name).is_file():
            return server
    raise PFedSAMError(
        "E01", f"{kit} is no startup kit of a site or a server.", "Give the folder that holds startup/ and local/."
    )


def init_kit(kit: Path, settings: SiteSettings, *, byoc: bool = False) -> list[Path]:
    """Write the policy of a site or a server.

    Args:
        kit: folder of the startup kit, as provisioned.
        settings: of the site; a server keeps its job store inside the kit and needs no settings.
        byoc: let jobs carry code. Such code runs with the rights of the site's process: no filter stops it.

    Returns:
        The files written. An old one is kept as `<name>.before`.

    Raises:
        PFedSAMError: E01 if it is no startup kit.
    """
    server = is_server(kit)
    local = kit / "local"
    resources = json.loads((local / f"{RESOURCES}.default").read_text())
    resources["class_allow_list"] = needed_classes()
    resources["allow_log_streaming"] = False
    resources["components"] = [
        one for one in resources.get("components", []) if one["path"].rsplit(".", 1)[-1] not in _LOG_SENDERS
    ]
    files: dict[str, Any] = {RESOURCES: _with_storage(resources, kit) if server else resources}
    permissions = json.loads((local / f"{AUTHORIZATION}.default").read_text())
    for role, rights in permissions["permissions"].items():
        # "any" for everything includes code in jobs
        permissions["permissions"][role] = _rights(rights, byoc)
    files[AUTHORIZATION] = permissions
    if not server:
        scope = {"name": SCOPE, "properties": {}, "task_result_filters": [{"path": FILTER}], "task_data_filters": []}
        files[PRIVACY] = {"scopes": [scope], "default_scope": SCOPE}
        files[SITE_SETTINGS] = settings.model_dump(exclude_none=True)
    return [_write(local / name, content) for name, content in files.items()]


def check_kit(kit: Path) -> Iterator[Finding]:
    """Look at everything that a job will need, and change nothing.

    Raises:
        PFedSAMError: E01 if it is no startup kit.
    """
    server = is_server(kit)
    yield from _check_policy(kit, server)
    yield from _check_certificate(kit)
    yield from _check_machine(kit)
    yield _check_port(kit) if server else _check_reachable(kit)
    if not server:
        yield from _check_data(kit)


def _rights(rights: Any, byoc: bool) -> Any:
    if byoc:
        return rights
    operations = ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate", "shell_commands")
    if rights == "any":
        rights = dict.fromkeys(operations, "any")
    # a shell command of an administrator reads files of the site
    closed = {"byoc": "none", "shell_commands": "none", "server-predeployed-flwr": "none"}
    return {**rights, **closed}


def _with_storage(resources: dict[str, Any], kit: Path) -> dict[str, Any]:
    """Jobs and snapshots inside the kit, not in a folder that all servers of a machine share."""
    # a site that is silent for so long counts as gone; a cut of a minute is survived
    resources["servers"][0]["heart_beat_timeout"] = _SILENT_SECONDS
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit.resolve() / "snapshots")
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit.resolve() / "jobs")
    return resources


def _write(path: Path, content: Any) -> Path:
    text = json.dumps(content, indent=2) + "\n"
    if path.exists() and path.read_text() != text:
        path.replace(path.with_name(path.name + ".before"))
    path.write_text(text)
    return path


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _check_policy(kit: Path, server: bool) -> Iterator[Finding]:
    local = kit / "local"
    resources = _read(local / RESOURCES) or {}
    missing = sorted(set(needed_classes()) - set(resources.get("class_allow_list", ())))
    prefixes = [name for name in resources.get("class_allow_list", ()) if name.endswith(".")]
    fine = not missing and not prefixes and resources.get("class_list_enforcement_mode") == "enforce"
    wrong = f"missing {missing[:2]}" if missing else f"prefixes {prefixes[:2]}, or not enforced"
    what = "exact classes, enforced" if fine else wrong
    yield Finding("classes", fine, f"{local / RESOURCES}: {what}")
    streams = resources.get("allow_log_streaming", True) or any(
        one["path"].endswith(_LOG_SENDERS) for one in resources.get("components", ())
    )
    yield Finding("log streaming", not streams, "off" if not streams else f"on in {local / RESOURCES}: logs name cases")
    permissions = (_read(local / AUTHORIZATION) or {}).get("permissions", {})
    open_roles = [r for r, rights in permissions.items() if rights == "any" or _may_bring_code(rights)]
    closed = bool(permissions) and not open_roles
    yield Finding("code in jobs", closed, "denied" if closed else f"allowed for {open_roles or 'everybody'}")
    if server:
        return
    privacy = _read(local / PRIVACY) or {}
    scopes = {one["name"]: one for one in privacy.get("scopes", ())}
    chain = scopes.get(privacy.get("default_scope"), {}).get("task_result_filters") or [{}]
    found = chain[0].get("path")
    yield Finding("outgoing filter", found == FILTER, f"{local / PRIVACY}: the first filter is {found}")


def _may_bring_code(rights: Mapping[str, Any]) -> bool:
    return rights.get("byoc", "none") != "none"


def _check_certificate(kit: Path) -> Iterator[Finding]:
    from datetime import datetime, timezone

    from cryptography import x509

    for path in [*sorted((kit / "startup").glob("*.crt")), kit / "startup" / "rootCA.pem"]:
        try:
            expires = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            yield Finding("certificate", False, f"{path}: {error}")
            continue
        days = (expires - datetime.now(timezone.utc)).days
        message = f"{path.name} expires {expires:%Y-%m-%d}, in {days} days"
        yield Finding("certificate", days >= _EXPIRES_SOON_DAYS, message)


def _target(content: Any) -> tuple[str, int]:
    """Host and port of the server, as NVFlare's configuration names them."""
    host, _, port = str(content["servers"][0]["service"]["target"]).rpartition(":")
    return host, int(port)


def _check_reachable(kit: Path) -> Finding:
    """Whether the server's port answers from this machine."""
    try:
        host, port = _target(_read(kit / "startup" / "fed_client.json"))
    except (KeyError, IndexError, TypeError, ValueError):
        return Finding("server", False, f"{kit / 'startup' / 'fed_client.json'} names no server")
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return Finding("server", True, f"{host} port {port} answers")
    except OSError as error:
        why = f"{type(error).__name__}: {error}"
        return Finding("server", False, f"{host} port {port} does not answer ({why}): not running, or a firewall")


def _check_port(kit: Path) -> Finding:
    """Whether the port that the server will open is free, or the server's own."""
    import psutil

    try:
        _, port = _target(_read(kit / "startup" / "fed_server.json"))
    except (KeyError, IndexError, TypeError, ValueError):
        return Finding("port", False, f"{kit / 'startup' / 'fed_server.json'} names no port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return Finding("port", True, f"port {port} is free")
        except OSError:
            pass
    for process in psutil.process_iter(["cmdline"]):
        if str(kit.resolve()) in (process.info["cmdline"] or ()):
            return Finding("port", True, f"port {port} is this server's, which runs as process {process.pid}")
    return Finding("port", False, f"port {port} is taken by something else")


def _check_machine(kit: Path) -> Iterator[Finding]:
    import shutil
    from importlib.metadata import version

    import psutil

    free = shutil.disk_usage(kit).free / 2**30
    yield Finding("disk", free >= _LEAST_DISK_GIB, f"{free:.0f} GiB free, at least {_LEAST_DISK_GIB} are wanted")
    memory = psutil.virtual_memory().available / 2**30
    message = f"{memory:.0f} GiB available, at least {_LEAST_MEMORY_GIB} are wanted"
    yield Finding("memory", memory >= _LEAST_MEMORY_GIB, message)
    told = ", ".join(f"{name} {version(name)}" for name in ("pfedsam", "nvflare", "monai", "torch"))
    yield Finding("versions", True, told)


def _check_data(kit: Path) -> Iterator[Finding]:
    from pfedsam.data.sites import read_site
    from pfedsam.federated.settings import read_settings, site_folder
    from pfedsam.state import state_root

    try:
        settings = read_settings(kit / "local" / SITE_SETTINGS)
        name = (_read(kit / "startup" / "fed_client.json") or {}).get("client", {}).get("fqsn", kit.name)
        folder = site_folder(settings.data_root, str(name))
        yield Finding("data", True, f"{folder}: {len(read_site(folder))} cases (pfedsam validate {folder} says more)")
    except PFedSAMError as error:
        yield Finding("data", False, str(error))
        return
    root = state_root(settings.state_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".probe"
        probe.write_text("")
        probe.unlink()
        inside = kit.resolve() in root.resolve().parents
        text = f"{root}" + (" lies inside the NVFlare workspace: an upgrade would remove it" if inside else "")
        yield Finding("state", not inside, text)
    except OSError as error:
        yield Finding("state", False, f"{root} cannot be written: {error}")
