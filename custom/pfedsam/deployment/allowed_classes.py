"""The classes that a job names, and the list of those that a site, a server or a simulator allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pfedsam.bundles import folder
from pfedsam.deployment.job_files import MEAN, META, read_json
from pfedsam.deployment.job_privacy import DECRYPT, ENCRYPT, ENCRYPTED, GUARD, NOISE, PACK, UNPACK
from pfedsam.deployment.job_tracker import MLFLOW
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_like
from pfedsam.storage.job_plan import CLIENT, SERVER

#: Classes of a server that no packaged job names: for the plain mean, in jobs of before there were other rules, and the
#: tracker that a job may have instead of TensorBoard's.
_OTHER_SERVER = (
    MLFLOW,
    MEAN["path"],
    "nvflare.app_common.widgets.intime_model_selector.IntimeModelSelector",
    "pfedsam.federated.aggregators.ProductAggregator",
)
#: What is in `startup/` of a server's and of a site's kit.
KIT_FILES = ("fed_server.json", "fed_client.json")


def classes_of(job: Path) -> list[str]:
    """Exact class paths that a job needs beside those that NVFlare allows by default."""
    from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

    named: set[str] = set()
    for name in (SERVER, CLIENT):
        _collect_paths(read_json(job / "app" / "config" / name), named)
    return sorted(named - set(DEFAULT_CLASS_ALLOW_LIST))


def needed_classes(side: str) -> list[str]:
    """Exact class paths that the packaged jobs and `Privacy` name, and nothing else: what has to be allowed.

    Args:
        side: `SERVER` or `CLIENT`: a class of the server has no business at a site.
    """
    of_privacy = {
        CLIENT: {NOISE, PACK, ENCRYPT, DECRYPT},
        SERVER: {UNPACK, GUARD, *(component["path"] for component in ENCRYPTED.values()), *_OTHER_SERVER},
    }
    named: set[str] = set(of_privacy[side])
    for job in folder("jobs").glob(f"*/{META}"):
        _collect_paths(json.loads((job.parent / "app" / "config" / side).read_text()), named)
    return sorted(named)


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
                raise PFedSAMError(
                    ErrorCode.SITE_SETTINGS, f"{source} is no JSON: {error}.", "Mend it by hand."
                ) from None
            break
    allowed = list(settings.get("class_allow_list", DEFAULT_CLASS_ALLOW_LIST))
    added = [name for name in classes_of(job) if name not in allowed]
    settings["class_allow_list"] = [*allowed, *added]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{json.dumps(settings, indent=2)}\n"
    write_like(path, text.encode(), next((file for file in (path, source) if file.exists()), path.parent))
    return path, added


def require_workspace(workspace: Path) -> None:
    """Refuse a folder that NVFlare would not read a list of classes from.

    Raises:
        PFedSAMError: E01 if it is no startup kit of a site or a server and holds no list of classes.
    """
    local = workspace / "local"
    if any((workspace / "startup" / name).is_file() for name in KIT_FILES):
        return
    if any((local / name).is_file() for name in ("resources.json", "resources.json.default")):
        return
    problem = "is no startup kit of a site or a server" if workspace.is_dir() else "is not there"
    raise PFedSAMError(
        ErrorCode.SITE_SETTINGS,
        f"{workspace} {problem}.",
        "Give the folder that holds startup/ and local/; --simulator makes the workspace of `nvflare simulator`.",
    )


def _collect_paths(node: Any, named: set[str]) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("path"), str):
            named.add(node["path"])
        for value in node.values():
            _collect_paths(value, named)
    elif isinstance(node, list):
        for value in node:
            _collect_paths(value, named)
