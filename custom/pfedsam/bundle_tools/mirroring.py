"""Classes that mirror each other, as left and right lung, and the step of a training that would mix them up.

A training image that is mirrored left to right shows the left lung where the right one is seen otherwise, and its label
says "left": the network is taught that both look the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Words of a class's name that say on which side it is, as pairs.
_SIDES = (("left", "right"), ("l", "r"), ("lt", "rt"))
#: Of a slice or picture, the axis that points right, as a reader sees it; volumes are turned to RAS first.
_SIDEWAYS = 0
#: Transforms that mirror along `spatial_axis`, all axes where it is None.
_FLIPS = ("Flipd", "RandFlipd", "RandAxisFlipd")


def name_sides(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of classes whose names differ in a word for left and right only: `lung_left` and `lung_right`."""
    known = {name.lower(): name for name in names}
    pairs = []
    for lower, name in known.items():
        words = lower.split("_")
        for left, right in _SIDES:
            for at, word in enumerate(words):
                other = "_".join([*words[:at], right, *words[at + 1 :]])
                if word == left and other in known:
                    pairs.append((name, known[other]))
    return pairs


def mirrors(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The random steps of a bundle's training configuration that mirror left to right."""
    steps = training.get("train", {}).get("random_transforms", [])
    return [step for step in steps if _mirrors(step)]


def without_mirroring(training: dict[str, Any]) -> None:
    """Take the random steps that mirror left to right out of a bundle's training configuration, in place."""
    steps = training["train"]["random_transforms"]
    training["train"]["random_transforms"] = [step for step in steps if not _mirrors(step)]


def _mirrors(step: dict[str, Any]) -> bool:
    if str(step.get("_target_", "")).rsplit(".", 1)[-1] not in _FLIPS or step.get("prob", 1) == 0:
        return False
    axis = step.get("spatial_axis")
    return axis is None or "Axis" in step["_target_"] or _SIDEWAYS in (axis if isinstance(axis, list) else [axis])
