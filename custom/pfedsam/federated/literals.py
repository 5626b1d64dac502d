"""A job's configuration says plain words: no variable that NVFlare would fill in, no path, no expression.

NVFlare replaces `{NAME}` and `{$NAME}` in every text of a job's configuration by values of the machine that reads it,
environment variables among them, before any component of ours is built. What was filled in could leave in a name or a
message. So both sides read the file as it came with the job, and refuse it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pfedsam.errors import ErrorCode, PFedSAMError

#: At the server a setting of the same file may stand for a number of the workflow.
_SERVER_REFERENCE = re.compile(r"\{[a-z_]+\}")
_FORBIDDEN = re.compile(r"[{}$\\/]|\.\.")


def require_literal(app: str | Path, name: str, references: bool = False) -> None:
    """Check a job's configuration file as it was submitted.

    Args:
        app: the job's app folder on this machine.
        name: file name, `SERVER`, `CLIENT` or `PLAN_FILE` of `pfedsam.storage.job_plan`.
        references: whether a text may be the name of a setting in braces.

    Raises:
        PFedSAMError: E18 naming the place of the first text that is not plain, or a second file that NVFlare would also
            read (YAML and HOCON, which can include others).
    """
    path = Path(app) / "config" / name
    others = sorted(file.name for file in path.parent.glob(f"{path.stem}.*") if file.name != name)
    if others or not path.is_file():
        configuration = f"{others or 'nothing'} instead of {name} alone"
        raise PFedSAMError(
            ErrorCode.OVERRIDE_NOT_ALLOWED,
            f"the job's configuration is {configuration}.",
            "Make the job with `pfedsam job make`.",
        )
    for place, text in _texts(json.loads(path.read_text(encoding="utf-8"))):
        if references and _SERVER_REFERENCE.fullmatch(text):
            continue
        if _FORBIDDEN.search(text):
            raise PFedSAMError(
                ErrorCode.OVERRIDE_NOT_ALLOWED,
                f"{name}, {place}: {text!r} holds a variable, a path or an expression.",
                "A job says plain words; data, devices and paths are the site's own settings (local/pfedsam.json).",
            )


def _texts(node: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every key and text with its place, for example `components.2.args.federation`."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield f"{place}.{key}".lstrip("."), str(key)
            yield from _texts(value, f"{place}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{place}.{number}".lstrip("."))
