"""What `pfedsam site check` looks at: everything that a job will need at a site or a server. It changes nothing."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_IROTH, S_IXOTH
from typing import Any

from nvflare.fuel.sec.authz import parse_policy_config
from nvflare.security.security import COMMAND_CATEGORIES

from pfedsam.deployment.allowed_classes import needed_classes
from pfedsam.deployment.certificates import WARN_DAYS, of_kit
from pfedsam.deployment.kit_renewal import pair_problem
from pfedsam.deployment.kits import AUTHORIZATION, FILTER, PRIVACY, RESOURCES, SHELL, is_server, open_secrets, outgoing
from pfedsam.deployment.reach import reach, target
from pfedsam.errors import PFedSAMError
from pfedsam.federated.log_streaming import LOG_SENDERS
from pfedsam.federated.settings import SITE_SETTINGS, SiteSettings
from pfedsam.storage.job_plan import CLIENT, SERVER

#: A certificate that ends sooner is a problem; before that it is a warning, see `WARN_DAYS`.
_EXPIRES_SOON_DAYS = 30
_LEAST_DISK_GIB, _LEAST_MEMORY_GIB = 5, 4
#: What NVFlare writes of a site and of a job, in the kit and in the job's folder there.
_LOGS = ("log*.txt*", "error_log.txt*", "log.json*")


@dataclass(frozen=True)
class Finding:
    """One line of `pfedsam site check`.

    Attributes:
        name: what was looked at.
        fine: False if jobs would fail, or the site would allow more than it should.
        message: what was found.
        warning: fine, but somebody should have decided so.
    """

    name: str
    fine: bool
    message: str
    warning: bool = False


def check_kit(kit: Path) -> Iterator[Finding]:
    """Look at everything that a job will need, and change nothing.

    Raises:
        PFedSAMError: E01 if it is no startup kit.
    """
    server = is_server(kit)
    yield from _check_policy(kit, server)
    yield from _check_access("kit", kit, _of_kit(kit))
    yield from _check_certificate(kit)
    yield from _check_keys(kit)
    yield from _check_machine(kit)
    yield _check_port(kit) if server else _check_reachable(kit)
    if not server:
        yield from _check_data(kit)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _check_policy(kit: Path, server: bool) -> Iterator[Finding]:
    local = kit / "local"
    resources = _read(local / RESOURCES) or {}
    allowed, needed = set(resources.get("class_allow_list", ())), set(needed_classes(SERVER if server else CLIENT))
    missing, prefixes = sorted(needed - allowed), sorted(name for name in allowed if name.endswith("."))
    fine = not missing and not prefixes and resources.get("class_list_enforcement_mode") == "enforce"
    wrong = f"missing {missing[:2]}" if missing else f"prefixes {prefixes[:2]}, or not enforced"
    what = "exact classes, enforced" if fine else wrong
    yield Finding("classes", fine, f"{local / RESOURCES}: {what}")
    extra = sorted(allowed - needed - set(prefixes))
    if extra:
        yield Finding("classes", True, f"{local / RESOURCES} allows more than our jobs need: {extra}", warning=True)
    streams = resources.get("allow_log_streaming", True) or any(
        component["path"].endswith(LOG_SENDERS) for component in resources.get("components", ())
    )
    yield Finding("log streaming", not streams, "off" if not streams else f"on in {local / RESOURCES}: logs name cases")
    yield from _check_rights(local / AUTHORIZATION)
    if server:
        return
    yield _check_scopes(local / PRIVACY)


def _check_rights(path: Path) -> Iterator[Finding]:
    """Whether any role may bring code in a job, or read files of the machine with a shell command."""
    try:
        policy, problem = parse_policy_config(_read(path) or {}, COMMAND_CATEGORIES)
    except TypeError as error:
        policy, problem = None, str(error)
    for name, rights in (("code in jobs", ("byoc",)), ("shell commands", SHELL)):
        if policy is None:
            yield Finding(name, False, f"not denied in {path}: {problem}")
            continue
        allowed = [role for role, given in policy.role_rights.items() if any(_allows(given, right) for right in rights)]
        yield Finding(name, not allowed, f"allowed for {allowed} in {path}" if allowed else "denied")


def _allows(given: Mapping[str, Any], right: str) -> bool:
    """Whether a role has a right, be it on a condition; "*" stands where one word is for all rights."""
    condition = given.get("*", given.get(right, "none"))
    return not isinstance(condition, str) or condition.strip().lower() not in ("none", "no")


def _check_scopes(path: Path) -> Finding:
    """Whether our filter comes first in every scope: a job may name any of them in its meta.json."""
    privacy = _read(path) or {}
    first = {str(scope.get("name")): (outgoing(scope) or [{}])[0].get("path") for scope in privacy.get("scopes") or ()}
    others = {name: filter_path for name, filter_path in first.items() if filter_path != FILTER}
    default = privacy.get("default_scope")
    if default not in first:
        return Finding("outgoing filter", False, f"{path}: there is no default scope '{default}'")
    if others:
        listed = ", ".join(f"{filter_path} in scope '{name}'" for name, filter_path in others.items())
        return Finding("outgoing filter", False, f"{path}: the first filter is {listed}; jobs may name any scope")
    return Finding("outgoing filter", True, f"{path}: the first filter is {FILTER} in every scope")


def _of_kit(kit: Path) -> Iterator[Path]:
    """Settings, policy and logs."""
    yield from (kit / "local" / name for name in (SITE_SETTINGS, RESOURCES, PRIVACY, AUTHORIZATION))
    yield from (log for folder in ("", "*/") for name in _LOGS for log in kit.glob(folder + name))


def _check_access(name: str, top: Path, paths: Iterable[Path]) -> Iterator[Finding]:
    """A warning if everybody with an account on this machine can read one of these files or folders of `top`."""
    readable = sorted(str(path) for path in paths if _others_may_read(path))
    if readable:
        message = f"others on this machine can read {', '.join(readable[:3])}{' ...' if len(readable) > 3 else ''}"
        yield Finding(f"{name} access", True, f"{message}: chmod -R o-rwx {shlex.quote(str(top))}", warning=True)


def _others_may_read(path: Path) -> bool:
    """Whether others may read a file, or list a folder, and pass through all folders above it."""
    if not path.exists() or not path.stat().st_mode & S_IROTH:
        return False
    return all(folder.stat().st_mode & S_IXOTH for folder in path.resolve().parents)


def _check_certificate(kit: Path) -> Iterator[Finding]:
    try:
        found = of_kit(kit)
    except PFedSAMError as error:
        yield Finding("certificate", False, error.message)
        return
    for one in found:
        message = f"{one.path.name} ends {one.words}"
        if one.days < WARN_DAYS:
            message += ": ask the project administrator for a renewed kit (`pfedsam certificates renew`)"
        yield Finding("certificate", one.days >= _EXPIRES_SOON_DAYS, message, warning=one.days < WARN_DAYS)


def _check_keys(kit: Path) -> Iterator[Finding]:
    """Whether key, certificate and root belong together, and only the owner can read what is secret."""
    if problem := pair_problem(kit):
        yield Finding("certificate", False, problem)
    readable = " ".join(shlex.quote(str(path)) for path in open_secrets(kit))
    told = f"others than the owner can read it: chmod 600 {readable}" if readable else "for the owner only to read"
    yield Finding("private key", not readable, told)


def _check_reachable(kit: Path) -> Finding:
    """Whether the server's port answers from this machine, on the way that the site takes."""
    try:
        return Finding("server", *reach(_read(kit / "startup" / "fed_client.json")))
    except (KeyError, IndexError, TypeError, ValueError):
        return Finding("server", False, f"{kit / 'startup' / 'fed_client.json'} names no server")


def _check_port(kit: Path) -> Finding:
    """Whether the port that the server will open is free, or the server's own."""
    import psutil

    try:
        _, port = target(_read(kit / "startup" / "fed_server.json"))
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
    versions = ", ".join(f"{name} {version(name)}" for name in ("pfedsam", "nvflare", "monai", "torch"))
    yield Finding("versions", True, versions)


def _check_data(kit: Path) -> Iterator[Finding]:
    from pfedsam.data.site_folder import labelled_cases, read_site
    from pfedsam.federated.settings import prepared_path, read_settings, site_folder
    from pfedsam.storage.state import state_root

    try:
        settings = read_settings(kit / "local" / SITE_SETTINGS)
        name = (_read(kit / "startup" / "fed_client.json") or {}).get("client", {}).get("fqsn", kit.name)
        folder = site_folder(settings.data_root, str(name))
        cases = read_site(folder)
        without = len(cases) - len(labelled_cases(folder, cases))
        told = f"{len(cases)} cases" + (f", {without} of them without a label" if without else "")
        yield Finding("data", True, f"{folder}: {told} (pfedsam validate {folder} says more)")
        yield from _check_access("data", folder, [folder, folder / "images", folder / "labels"])
    except PFedSAMError as error:
        yield Finding("data", False, str(error))
        return
    yield Finding("limits", True, _limits(settings))
    yield from _check_folder("state", kit, state_root(settings.state_root))
    prepared = prepared_path(settings, str(name))
    if prepared is not None:
        yield from _check_folder("prepared volumes", kit, prepared)


def _check_folder(name: str, kit: Path, folder: Path) -> Iterator[Finding]:
    """Whether a folder of the site can be written, lies outside the kit, and is closed to others."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
        inside = kit.resolve() in folder.resolve().parents
        text = f"{folder}" + (" lies inside the NVFlare workspace: an upgrade would remove it" if inside else "")
        yield Finding(name, not inside, text)
        yield from _check_access(name, folder, [folder])
    except OSError as error:
        yield Finding(name, False, f"{folder} cannot be written: {error}")


def _limits(settings: SiteSettings) -> str:
    """What the site's own file asks of a job, in words."""
    bounds = {
        "sites at least": settings.least_sites,
        "validation cases at least": settings.least_validation_cases,
        "rounds at most": settings.most_rounds,
        "epochs of a round at most": settings.most_epochs,
        "hours at most": settings.most_hours,
        "clip at most": settings.largest_clip,
        "noise at least": settings.least_noise,
    }
    limits = ", ".join(f"{what} {'any' if value is None else format(value, 'g')}" for what, value in bounds.items())
    agreed = "any federation" if settings.federations is None else f"federations {', '.join(settings.federations)}"
    return f"{limits}; {agreed}; curves {'on' if settings.curves else 'off'}" + (
        "; other sites may see this site's model" if settings.peers_see_my_model else ""
    )
