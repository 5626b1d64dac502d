"""What is in a bundle that was just made, in words, and what to change first: read from its files, so it is true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pfedsam.bundle_tools.mirroring import mirrors
from pfedsam.bundles import METADATA, TRAIN, is_rgb

#: What a step of the preparation or of the augmentation does, by the end of its name.
_STEPS = {
    "RandFlipd": "mirrored left to right",
    "RandAffined": "turned by up to {degrees:.0f} degrees, scaled by up to {scale_range[0]:.0%}, moved",
    "RandAdjustContrastd": "gamma {gamma[0]} to {gamma[1]}",
    "RandGaussianNoised": "noise",
}


def explained(root: Path) -> list[str]:
    """Lines about a bundle: classes, images, augmentation, training, and what to change first.

    Args:
        root: its folder, as `pfedsam.bundle_tools.new.new_bundle` has written it.
    """
    training = json.loads((root / "configs" / TRAIN).read_text())
    told = json.loads((root / "configs" / METADATA).read_text())
    view = training.get("field_of_view_mm")
    steps = [_described(step) for step in training["train"]["random_transforms"]]
    label = ", ".join(f"{number} {name}" for number, name in enumerate(["background", *training["class_names"]]))
    kind = (
        "pictures (PNG, JPG, TIFF, BMP, X-rays in DICOM)" if is_rgb(root) else "volumes (NIfTI, DICOM), slice by slice"
    )
    seen = f"; {view:g} mm of each slice are seen" if view else ""
    lines = [
        f"images: {kind}: {told['image_classes']}{seen}",
        f"label values: {label}",
        f"network: {training['backbone']}, {training['image_size']} x {training['image_size']} pixels",
        f"training images are varied: {', '.join(steps)}",
    ]
    if not mirrors(training):
        lines.append("they are not mirrored left to right, as classes mirror each other")
    return [*lines, "", "What to change first:", *_first(root, training)]


def _described(step: dict[str, Any]) -> str:
    name = str(step["_target_"]).rsplit(".", 1)[-1]
    return _STEPS.get(name, name).format(**step, degrees=math.degrees(step.get("rotate_range", 0)))


def _first(root: Path, training: dict[str, Any]) -> list[str]:
    config = root / "configs" / TRAIN
    lines = [
        f"  image_size {training['image_size']}: larger for fine structures (256; time grows with its square): --set "
        "image_size=256 in any command"
    ]
    if "field_of_view_mm" in training:
        view = f"{training['field_of_view_mm']:g}"
        lines.append(f"  field_of_view_mm {view}: what your images show, or --set field_of_view_mm=... in any command")
    lines += [
        f"  the variations, under train#random_transforms in {config}",
        f"  where your data are from, and under which licence: {root / 'docs' / 'README.md'}",
        "  all other settings: pfedsam settings",
    ]
    return lines
