"""Jobs as folders: the checked-in one, copies of it with other settings, and its locked form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.bundles import folder
from pfedsam.errors import PFedSAMError

SERVER, CLIENT = "config_fed_server.json", "config_fed_client.json"


def find_job(name_or_path: str) -> Path:
    """A job folder by path, or the packaged job of that name.

    Raises:
        PFedSAMError: E16 if there is none.
    """
    for path in (Path(name_or_path), folder("jobs") / name_or_path):
        if (path / "meta.json").is_file():
            return path
    known = sorted(path.parent.name for path in folder("jobs").glob("*/meta.json"))
    raise PFedSAMError("E16", f"there is no job '{name_or_path}'.", f"Packaged jobs: {known}.")


def export_job(
    source: Path,
    out: Path,
    *,
    locked: bool = False,
    plan: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    persistor: Mapping[str, Any] | None = None,
) -> Path:
    """Write a copy of a job.

    Args:
        source: the job folder.
        out: folder to write; it must not exist, or be an exported job.
        locked: leave out `app/custom`, so that the job carries no code; each site must then allow its classes.
        plan: arguments of the plan to set on both sides.
        server: top-level settings of the server's configuration, for example `num_rounds`.
        persistor: arguments of the persistor to set.

    Raises:
        PFedSAMError: E16 if `out` is something else than a job folder.
    """
    if out.exists():
        if not (out / "meta.json").is_file():
            raise PFedSAMError("E16", f"{out} exists and is no job folder.", "Choose another folder.")
        shutil.rmtree(out)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("__pycache__"))
    if locked:
        shutil.rmtree(out / "app" / "custom", ignore_errors=True)
    for name in (SERVER, CLIENT):
        path = out / "app" / "config" / name
        config = json.loads(path.read_text())
        _component(config, "plan")["args"].update(plan or {})
        if name == SERVER:
            config.update(server or {})
            _component(config, "persistor")["args"].update(persistor or {})
        path.write_text(json.dumps(config, indent=2) + "\n")
    return out


def plan_settings(job: Path) -> dict[str, Any]:
    """Arguments of a job's plan."""
    return _component(json.loads((job / "app" / "config" / SERVER).read_text()), "plan")["args"]


def server_settings(job: Path) -> dict[str, Any]:
    """The server's configuration."""
    return json.loads((job / "app" / "config" / SERVER).read_text())


def classes_of(job: Path) -> list[str]:
    """Exact class paths that a job needs beside those that NVFlare allows by default."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    named: set[str] = set()
    for name in (SERVER, CLIENT):
        _collect_paths(json.loads((job / "app" / "config" / name).read_text()), named)
    return sorted(named - set(DEFAULT_CLASS_ALLOW_LIST))


def allow_classes(job: Path, workspace: Path) -> tuple[Path, list[str]]:
    """Add the classes of a job to the list of a site, a server or a simulator workspace.

    Args:
        job: the job folder.
        workspace: NVFlare workspace; its `local/resources.json` is written, from `resources.json.default` if there is
            one and from NVFlare's default list if not.

    Returns:
        The file and the classes that were added. Exact classes, no prefix: a prefix would also admit every callable
        that our modules import.

    Raises:
        PFedSAMError: E01 if the file that is there cannot be read.
    """
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    path = workspace / "local" / "resources.json"
    settings: dict[str, Any] = {"format_version": 2}
    for source in (path, path.with_name("resources.json.default")):
        if source.exists():
            try:
                settings = json.loads(source.read_text())
            except ValueError as error:
                raise PFedSAMError("E01", f"{source} is no JSON: {error}.", "Mend it by hand.") from None
            break
    allowed = list(settings.get("class_allow_list", DEFAULT_CLASS_ALLOW_LIST))
    added = [name for name in classes_of(job) if name not in allowed]
    settings["class_allow_list"] = [*allowed, *added]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return path, added


def _collect_paths(node: Any, named: set[str]) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("path"), str):
            named.add(node["path"])
        for value in node.values():
            _collect_paths(value, named)
    elif isinstance(node, list):
        for value in node:
            _collect_paths(value, named)


def _component(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    for component in config["components"]:
        if component["id"] == name:
            return component
    raise PFedSAMError("E16", f"the job has no component '{name}'.", "Start from a job of this project.")
