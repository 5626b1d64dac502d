"""What a bundle expects of a site folder: for `validate`, training alone, `personalize` and the learner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pfedsam.bundles import class_names, field_of_view, find_bundle, is_rgb, literals_of
from pfedsam.data.labels import class_numbers
from pfedsam.data.sections import FOLDS


class Expected(TypedDict):
    """Arguments of `pfedsam.data.checks.check_site`."""

    labels: list[int]
    seed: int
    folds: int
    colour: bool
    field_of_view: float | None


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
    return {
        "labels": list(class_numbers(class_names(root), label_map)),
        "seed": int(settings.get("seed", 0)),
        "folds": int(settings.get("folds", FOLDS)),
        "colour": is_rgb(root),
        "field_of_view": field_of_view(bundle, overrides),
    }
