"""What a bundle expects of a site folder: for `validate`, training alone, `personalize` and the learner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pfedsam.bundles import class_names, field_of_view, find_bundle, is_rgb, literals_of
from pfedsam.data.datalist_file import unknown_value
from pfedsam.data.labels import UNKNOWN, class_numbers, with_unknown
from pfedsam.data.sections import FOLDS


class Expected(TypedDict):
    """Arguments of `pfedsam.data.checks.check_site`."""

    labels: list[int]
    unknown: list[int]
    seed: int
    folds: int
    colour: bool
    field_of_view: float | None


def label_map_of(folder: str | Path, bundle: str, label_map: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """What the label values of a site mean, with the one that its `datalist.json` calls unknown.

    Args:
        folder: site folder.
        bundle: name of an installed bundle, whose class numbers they are otherwise.
        label_map: the site's own values, see `pfedsam.data.labels.class_numbers`.

    Returns:
        A label map, None if the values are the bundle's class numbers.

    Raises:
        PFedSAMError: E08 if `datalist.json` is wrong, or calls a class unknown; E28 if there is no such bundle.
    """
    found = with_unknown(label_map, class_names(find_bundle(bundle)), unknown_value(Path(folder)))
    return None if found is None else dict(found)


def expected_by(
    bundle: str, overrides: Mapping[str, Any] | None = None, label_map: Mapping[str, str] | None = None
) -> Expected:
    """What a site must hold to train this bundle.

    Args:
        bundle: name of an installed bundle.
        overrides: listed ids of its configuration; `seed`, `folds` and `field_of_view_mm` are looked at.
        label_map: the site's own values, see `class_numbers`.

    Raises:
        PFedSAMError: E28 if there is no such bundle, E29 if it cannot be read, E18 for wrong settings, E01 for a wrong
            label map.
    """
    root, settings = find_bundle(bundle), literals_of(bundle, overrides)
    numbers = class_numbers(class_names(root), label_map)
    return {
        "labels": list(numbers),
        "unknown": [value for value, number in numbers.items() if number == UNKNOWN],
        "seed": int(settings.get("seed", 0)),
        "folds": int(settings.get("folds", FOLDS)),
        "colour": is_rgb(root),
        "field_of_view": field_of_view(bundle, overrides),
    }
