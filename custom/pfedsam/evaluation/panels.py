"""What the panels of a case show, and say: image, truth, each model alone, and where each model differs from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.picture import Picture
from pfedsam.evaluation.difference import Mask, difference
from pfedsam.evaluation.site import CasePrediction, SiteEvaluation

#: Slices of a volume that are shown.
SLICES = 3
#: Of more classes the title has the mean only; each class is in the words beside the picture.
_TITLED_CLASSES = 4


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        name: `image`, `truth`, a model, or a model and `difference`.
        title: in words, with the Dice of the whole case.
        classes: `(C, x, y)`, to be outlined; none in the panel of the image.
        difference: areas `(x, y)` by name, see `pfedsam.evaluation.difference`; none in other panels.
        note: what is to be said of this plane.
    """

    name: str
    title: str
    classes: Mask | None = None
    difference: Mapping[str, Mask] = field(default_factory=dict)
    note: str = ""


def planes_of(shown: CasePrediction) -> list[int]:
    """The slices of a volume that say most of a case, at most `SLICES`; a picture has one.

    The one with the most truth; the one with the most that was found where no truth is, if there is any; then those
    half way to both ends of the truth.
    """
    area, told = _by_plane(shown.label), np.sum([_by_plane(one) for one in shown.predictions.values()], axis=0)
    alone = np.where(area > 0, 0, told)
    there = np.flatnonzero(area if area.any() else told)
    if not there.size:
        return [shown.label.shape[-1] // 2]
    most = int((area if area.any() else told).argmax())
    chosen = [most, *([int(alone.argmax())] if alone.any() else []), (there[0] + most) // 2, (most + there[-1]) // 2]
    return sorted(list(dict.fromkeys(map(int, chosen)))[:SLICES])


def _by_plane(masks: Mask) -> NDArray[np.int_]:
    """Voxels of any class in each slice of `(C, x, y, z)`."""
    return masks.any(0).sum(axis=(0, 1))


def panels_of(evaluation: SiteEvaluation, shown: CasePrediction, z: int) -> list[Panel]:
    """The panels of one plane: image, truth, then each model with its difference."""
    truth, names = shown.label[..., z], evaluation.class_names
    panels = [Panel("image", "image"), Panel("truth", "truth", truth, note="" if truth.any() else "no truth here")]
    for model, masks in shown.predictions.items():
        found = masks[..., z]
        areas = difference(truth, found)
        counts = ", ".join(f"{name} {int(area.sum()):,}" for name, area in areas.items())
        panels += [
            Panel(model, _model_title(evaluation, shown, model), found, note=_absent(truth, found, names)),
            Panel(f"{model} difference", f"{model}: difference", truth if len(names) > 1 else None, areas, counts),
        ]
    return panels


def _absent(truth: Mask, found: Mask, names: Sequence[str]) -> str:
    """Which classes of the truth a model has not found in a plane."""
    if not found.any():
        return "nothing found here" if truth.any() else "rightly nothing found"
    absent = [name for name, there, told in zip(names, truth, found, strict=True) if there.any() and not told.any()]
    return f"not found here: {', '.join(absent)}" if absent else ""


def _model_title(evaluation: SiteEvaluation, shown: CasePrediction, model: str) -> str:
    dice = evaluation.dice_by_class(shown.case, model)
    title = f"{model}: Dice {evaluation.dice_of(shown.case, model):.2f}"
    if not shown.predictions[model].any():
        title += ", nothing found"
    if 1 < len(dice) <= _TITLED_CLASSES:
        title += "\n" + ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
    return title


def heading(evaluation: SiteEvaluation, example: str) -> str:
    """What a picture is of; it names the site, not the case."""
    return f"{evaluation.site}, {example} {evaluation.section} case"


def plane_name(image: Picture, z: int) -> str:
    """A slice by its number, from 1; "" for a picture."""
    depth = image.volume_shape[2]
    return "" if image.kind == "picture" or depth == 1 else f"slice {z + 1} of {depth}"


def words_of(evaluation: SiteEvaluation, example: str, image: Picture) -> str:
    """The picture in words: for those who do not see it, and for searching."""
    shown = evaluation.examples[example]
    sentences = []
    for model, masks in shown.predictions.items():
        dice = evaluation.dice_by_class(shown.case, model)
        classes = ", ".join(f"{name} {value:.2f}" for name, value in dice.items())
        areas = {name: int(area.sum()) for name, area in difference(shown.label, masks).items()}
        counts = ", ".join(f"{count:,} {name}" for name, count in areas.items())
        unit = "pixels" if image.kind == "picture" else "voxels"
        told = f"{model.capitalize()} model: Dice {classes}; {counts} {unit}"
        sentences.append(told if masks.any() else f"{told}; nothing found")
    if plane_name(image, 0):
        sentences.append(f"Slices {', '.join(str(z + 1) for z in planes_of(shown))} of {image.volume_shape[2]}")
    return ". ".join([heading(evaluation, example), *sentences]) + "."
