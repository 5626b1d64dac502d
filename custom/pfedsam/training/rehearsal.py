"""Load a site's first training batch and first validation case as training does, without a network.

The loading runs in a process of its own: its time is bounded, a crash of a library ends nothing else, and the memory of
the volumes goes back to the system when they are freed.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.bundles import find_bundle, local_settings
from pfedsam.data.expected import label_map_of
from pfedsam.data.site_report import SiteReport
from pfedsam.errors import ErrorCode, PFedSAMError, first_of_ours

#: Seconds that two cases may take; most of them are the start of the libraries.
LIMIT_SECONDS = 600.0
#: The part of the bundle's training configuration whose data loader gives a section.
_PARTS = {"training": "train", "validation": "validate"}
#: glibc keeps freed blocks of up to 32 MiB; from this size on they go back to the system.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}


def rehearse(report: SiteReport, bundle: str, folder: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Load a training case whose foreground is seen, as a batch, and a validation case through the bundle's transforms.

    The time is that of two cases, however many the site has. What goes wrong is added to the report as an error.

    Args:
        report: of the site, without errors.
        bundle: name of an installed bundle.
        folder: the site folder.
        overrides: of the bundle, as in training.
    """
    cases = first_cases(report)
    told = {"bundle": bundle, "folder": str(folder), "overrides": dict(overrides or {}), "cases": cases}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(told),
            env={**os.environ, **_ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        found = {"errors": [_ended(cases, f"took longer than {LIMIT_SECONDS:g} s")]}
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        found = {"errors": [_ended(cases, f"ended with code {done.returncode} ({reason})")]}
    report.loaded += found.get("loaded", [])
    for error in found.get("errors", []):
        report.add_error(PFedSAMError(error["code"], error["message"], error["remedy"]), error["case"])


def first_cases(report: SiteReport) -> dict[str, str]:
    """The case of each section that is tried: the first whose foreground is seen, else the first."""
    cases: dict[str, str] = {}
    for section in _PARTS:
        rows = [row for row in report.cases if row.section == section]
        for row in sorted(rows, key=lambda row: row.foreground <= row.unseen)[:1]:
            cases[section] = row.name
    return cases


def _ended(cases: Mapping[str, str], how: str) -> dict[str, str]:
    names = " and ".join(f"'{name}'" for name in cases.values())
    remedy = "Look at these cases, and at the memory that is free; --quick leaves this step out."
    return {
        "code": ErrorCode.UNREADABLE_IMAGE,
        "message": f"loading the cases {names} {how}.",
        "remedy": remedy,
        "case": "",
    }


def load_first(told: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Load one case of each section in this process.

    Args:
        told: `bundle`, `folder` and `overrides` as in `rehearse`, `cases` of `first_cases`, and `label_map` where the
            site's label values are not the bundle's.

    Returns:
        `loaded`: what was loaded, in words; `errors`: what went wrong, with `code`, `message`, `remedy` and `case`.
    """
    found: dict[str, list[Any]] = {"loaded": [], "errors": []}
    for section, case in told["cases"].items():
        try:
            batch = _first_batch(told, _PARTS[section], case)
            found["loaded"].append(f"{section}: {batch}")
        # a bundle's own transform may raise anything
        except Exception as error:
            ours = first_of_ours(error) or PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"case '{case}' passes the checks, but bundle '{told['bundle']}' cannot load it for {section}: "
                f"{type(error).__name__}: {_last_line(error)}.",
                "Look at the case and at the bundle's transforms; another bundle may fit (--bundle).",
            )
            found["errors"].append({"code": ours.code, "message": ours.message, "remedy": ours.remedy, "case": case})
        # a configuration refers to itself, and holds the volume
        gc.collect()
    return found


def _first_batch(told: Mapping[str, Any], part: str, case: str) -> str:
    """What comes first out of the data loader of one part of the training configuration, given one case, in words."""
    from monai.bundle import ConfigParser

    root = find_bundle(told["bundle"])
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "train.json"))
    settings = {"bundle_root": str(root), "dataset_dir": told["folder"], **local_settings(told["overrides"])}
    label_map = label_map_of(told["folder"], told["bundle"], told.get("label_map"))
    if label_map is not None:
        settings["label_map"] = label_map
    for key, value in settings.items():
        parser[key] = value
    key = f"{part}#data_list"
    # by its number: a name may hold what a configuration takes for a reference
    number = [item["case"] for item in parser.get_parsed_content(key)].index(case)
    parser[key] = f"$({parser.get(key).removeprefix('$')})[{number}:{number + 1}]"
    parser.parse(reset=True)
    batch = next(iter(parser.get_parsed_content(f"{part}#dataloader")))
    return ", ".join(f"{key} {tuple(batch[key].shape)}" for key in ("image", "label"))


def _last_line(error: BaseException) -> str:
    """What the library that raised first says."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


if __name__ == "__main__":
    print(json.dumps(load_first(json.load(sys.stdin))))
