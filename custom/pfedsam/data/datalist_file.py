"""`datalist.json`, the written split of a site: what the file holds, as far as it can be told without the site's cases.

It is JSON with these keys:

    training, validation, test   sections: lists of case names or of {"image": ..., "label": ..., "patient": ...} with
                                 paths relative to the site; `test` is optional
    folds                        instead of them a list of such sections, one a fold: seed s takes fold s modulo their
                                 number. All folds list the same cases.
    patients                     optional, case name to patient; alone it leaves the split to the seed
    unknown                      optional, the label value of voxels of which nobody has said what they are (scribbles)
    absent                       written by `pfedsam split`: entries of the sections whose files are not there now
    shares                       written by `pfedsam split`: how new patients are shared out to the sections

A patient is never in two sections. A case without a label needs no entry, and is in no section but `training`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.data.labels import UNKNOWN_NAME
from pfedsam.data.sections import SECTIONS
from pfedsam.errors import ErrorCode, PFedSAMError, shown

DATALIST = "datalist.json"
#: Value of a label of 16 bits.
_LARGEST = 65535


def read_content(folder: Path) -> dict[str, Any]:
    """What `datalist.json` holds, {} if there is none.

    Raises:
        PFedSAMError: E08 if it is not readable, has none of the keys, or a key of a wrong kind.
    """
    path = folder / DATALIST
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise wrong(folder, f"it is not readable JSON ({str(error).splitlines()[0]})") from None
    keys = (*SECTIONS, "folds", "patients", UNKNOWN_NAME)
    if not isinstance(content, dict) or not any(key in content for key in keys):
        raise wrong(folder, f"it has none of the keys {list(keys)}")
    if not isinstance(content.get("patients", {}), dict):
        raise wrong(folder, "'patients' does not map case names to patients")
    unknown = content.get(UNKNOWN_NAME, 1)
    if type(unknown) is not int or not 0 < unknown <= _LARGEST:
        raise wrong(folder, f"'{UNKNOWN_NAME}' is {shown(unknown)}, expected a label value from 1 to {_LARGEST}")
    _check_folds(folder, content)
    return content


def unknown_value(folder: Path) -> int | None:
    """The label value that a site's `datalist.json` calls unknown, None if it names none (E08 if the file is wrong)."""
    return read_content(folder).get(UNKNOWN_NAME)


def _check_folds(folder: Path, content: Mapping[str, Any]) -> None:
    """The kinds of what `pfedsam split` writes. A number of folds beside sections is what `write_split` tells."""
    sections, folds = [section for section in SECTIONS if section in content], content.get("folds")
    if isinstance(folds, list):
        if sections:
            raise wrong(folder, f"it has folds and the sections {sections}, expected one of them")
        if not folds or not all(isinstance(fold, dict) for fold in folds):
            raise wrong(folder, "'folds' is no list of sections")
    elif "folds" in content and not sections:
        raise wrong(folder, "'folds' is no list of sections")
    absent = content.get("absent", [])
    if not isinstance(absent, list) or not all(isinstance(name, str) for name in absent):
        raise wrong(folder, "'absent' is no list of case names")


def listed_parts(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What has sections in the content of a `datalist.json`: the whole, or each fold, by how a sentence names it."""
    if isinstance(content.get("folds"), list):
        return {f" of fold {number}": fold for number, fold in enumerate(content["folds"])}
    return {"": content} if any(section in content for section in SECTIONS) else {}


def entry_name(entry: Any) -> str:
    """The case name, or the path of the image, by which an entry of a section names a case; "" if it names none."""
    name = entry.get("image") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else ""


def wrong(folder: Path, what: str, remedy: str = "Correct the file, or remove it to split by seed.") -> PFedSAMError:
    """The error of a `datalist.json` of which something is wrong."""
    return PFedSAMError(ErrorCode.WRONG_SPLIT, f"'{folder / DATALIST}': {what}.", remedy)
