"""All that is written of one segmented image, and what a person is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pfedsam.bundles import class_values
from pfedsam.data.field_of_view import told
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.inference.predict import Prediction
from pfedsam.inference.writers import (
    OVERLAY,
    PALETTE,
    PROBABILITY,
    SEGMENTATION,
    WHITE,
    picture_probabilities,
    stem_of,
    write_label,
    write_probabilities,
)


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        class_names: of the bundle; label value n is the n-th.
        bundle: its name.
        which: `personal` or `global` model, for the caption.
        probabilities, overlay, segmentation: whether these are written beside the label; a segmentation object is
            written of DICOM only.
        mask: how the label of a picture is stored, see `pfedsam.inference.writers.write_label`.

    Raises:
        PFedSAMError: E16 for an unknown way to store a mask, E32 for black and white with several classes.
    """

    class_names: tuple[str, ...]
    bundle: str
    which: str
    probabilities: bool = False
    overlay: bool = False
    segmentation: bool = False
    mask: str = PALETTE

    def __post_init__(self) -> None:
        if self.mask not in (PALETTE, WHITE):
            message = f"there is no mask '{self.mask}'."
            raise PFedSAMError(ErrorCode.WRONG_SETTING, message, f"Take {PALETTE} or {WHITE}.")
        if self.mask == WHITE and len(self.class_names) > 1:
            message = f"black and white shows one class, and bundle '{self.bundle}' has {len(self.class_names)}."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, f"Take --mask {PALETTE}.")

    def endings(self) -> list[str]:
        """Endings of the files beside the label, of any kind of image."""
        asked = {
            (PROBABILITY, *picture_probabilities(self.class_names)): self.probabilities,
            (OVERLAY,): self.overlay,
            (SEGMENTATION,): self.segmentation,
        }
        return [ending for endings, wanted in asked.items() if wanted for ending in endings]


def write_results(found: Prediction, out: Path, wanted: Wanted) -> list[str]:
    """Write the results of one image; returns what to say of them, in lines.

    Raises:
        PFedSAMError: of the writers.
        OSError: if a file cannot be written.
    """
    from pfedsam.inference.overlay import write_overlay
    from pfedsam.inference.segmentation import is_series, write_segmentation

    label, source = found.label(), found.image.source
    stem = stem_of(source, out, wanted.class_names)
    path = write_label(label, found.image, stem, wanted.mask)
    if wanted.probabilities:
        write_probabilities(found.probabilities, found.image, stem, wanted.class_names)
    if wanted.segmentation and is_series(source):
        write_segmentation(label, source, stem, wanted.class_names, f"pFedSAM {wanted.bundle}")
    if wanted.overlay:
        write_overlay(found, stem.with_name(stem.name + OVERLAY), _classes(wanted), f"{wanted.which} model")
    count, unit = int((label > 0).sum()), "pixels" if found.image.kind == "picture" else "voxels"
    return [f"{path}: {count:,} {unit}" if count else f"{path}: nothing found", *_remarks(found)]


def _classes(wanted: Wanted) -> dict[str, list[int]]:
    """Label values that belong to each class, as the bundle has them in training; else each class has its own."""
    return dict(zip(wanted.class_names, map(list, class_values(wanted.bundle)), strict=True))


def _remarks(found: Prediction) -> Iterator[str]:
    for remark in found.remarks:
        yield f"  {found.image.source.name}: {remark}"
    if found.field_of_view is not None and found.share_unseen >= 0.005:
        yield f"  {found.image.source.name}: {told(found.share_unseen, found.field_of_view)}"
