"""What is wrong with one case: its image, its label, and how the two lie on each other."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.field_of_view import labelled_outside, share_outside
from pfedsam.data.geometry import same_place, turned_onto
from pfedsam.data.intensity import NO_WINDOW, window_is_empty
from pfedsam.data.labels import black_and_white, found_values
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.data.site_folder import Case
from pfedsam.data.site_report import CaseRow, SiteReport
from pfedsam.errors import ErrorCode, PFedSAMError, few

#: What a bundle for volumes makes of a picture.
_AS_SLICE = (
    "which this bundle for volumes reads as one grey slice of 1 mm pixels; a bundle for such pictures: pfedsam "
    "new-bundle <name> --classes <names> --modality"
)


def check_case(
    report: SiteReport, case: Case, labels: Sequence[int], unknown: Collection[int] = ()
) -> tuple[Picture, Picture] | None:
    """Check a case and add what is found to the report; nothing is raised for bad data.

    Args:
        report: of the case alone, with its row, which is filled.
        case: with its label, or without.
        labels: values that the label may hold.
        unknown: values that it may hold where nobody knows what is there.

    Returns:
        The image and the label as they were read, None if one of them could not be, or there is no label.
    """
    (row,) = report.cases
    image = _load(report, case, case.image)
    if image is not None:
        row.shape, row.spacing, row.orientation = image.shape, image.spacing, image.orientation
        row.dtype = str(image.values.dtype)
        _check_intensity(report, row, case, image)
        _check_fit(report, case, image)
        content = hashlib.sha256(f"{image.values.dtype}{image.values.shape}".encode())
        content.update(np.ascontiguousarray(image.values.T).data.cast("B"))
        report.contents[case.name] = content.hexdigest()
    if case.label is None:
        return None
    label = _load(report, case, case.label, label=True)
    if label is None:
        return None
    turned = label if image is None else turned_onto(image, label)
    if turned is not label:
        report.remark("the label is stored in another order of the axes, and is turned as its image", case.name)
    positive = _check_label(report, row, case, turned, labels, unknown)
    if image is None:
        return None
    _check_pair(report, row, case, image, turned, positive)
    return image, label


def _load(report: SiteReport, case: Case, path: Path, label: bool = False) -> Picture | None:
    try:
        picture = load_picture(path, label)
    except PFedSAMError as error:
        report.add_error(error, case.name)
        return None
    for note in picture.notes:
        report.remark(note, case.name)
    return picture


def _check_intensity(report: SiteReport, row: CaseRow, case: Case, image: Picture) -> None:
    row.intensity = (float(image.values.min()), float(image.values.max()))
    if row.intensity[0] == row.intensity[1]:
        text = f"image '{case.image}' is constant, every value is {row.intensity[0]:g}."
        report.add(ErrorCode.SITE_DATA, "error", case.name, text, "Export the image again, or take the case away.")
    elif not report.colour and window_is_empty(image.values):
        text = f"image '{case.image}': {NO_WINDOW}."
        report.add(
            ErrorCode.SITE_DATA, "warning", case.name, text, "Make sure that it is an image of the kind that is meant."
        )


def _check_fit(report: SiteReport, case: Case, image: Picture) -> None:
    """Whether the bundle can take an image of this kind, and how much of it."""
    if report.colour and (image.kind != "picture" or image.white is None):
        what = "is a volume" if image.kind != "picture" else f"holds {image.values.dtype} numbers without a white"
        text = f"image '{case.image}' {what}, and the bundle takes pictures (PNG, JPG, TIFF, BMP)."
        report.add(
            ErrorCode.UNREADABLE_IMAGE,
            "error",
            case.name,
            text,
            "Choose a bundle for volumes (--bundle brain_lesion_mri), or save it as a picture of 8 or 16 bits.",
        )
        return
    if not report.colour and image.is_colour:
        report.remark(f"a colour picture, {_AS_SLICE} rgb", case.name)
    elif not report.colour and image.kind == "picture":
        report.remark(f"a grey picture, {_AS_SLICE} grey", case.name)
    if report.field_of_view is not None:
        share = share_outside(image, report.field_of_view)
        if share >= 0.005:
            report.outside[case.name] = share


def _check_label(
    report: SiteReport, row: CaseRow, case: Case, label: Picture, labels: Sequence[int], unknown: Collection[int]
) -> NDArray[np.bool_]:
    """Returns where the label is neither background nor unknown."""
    values, found, known = label.values, found_values(label.values), [*labels, *unknown]
    white = black_and_white(found, known)
    if white is not None:
        found = [value // white for value in found]
        report.add(
            ErrorCode.LABEL_OUT_OF_RANGE,
            "note",
            case.name,
            f"label '{case.label}' holds 0 and {white}: {white} is read as 1.",
        )
    row.label_values = tuple(float(value) for value in found[:256])
    wrong = [value for value in found if value not in known]
    if wrong:
        text = f"label '{case.label}' holds {few(map(str, wrong))}, expected only {list(labels)}."
        report.add(
            ErrorCode.LABEL_OUT_OF_RANGE,
            "error",
            case.name,
            text,
            "Correct the label, or map its values to the bundle's.",
        )
    nobody_knows = np.isin(values, list(unknown)) if unknown and not white else np.zeros(1, dtype=bool)
    row.unknown = float(nobody_knows.mean())
    positive = (values > 0) & ~nobody_knows
    row.foreground = int(np.count_nonzero(positive))
    if positive.ndim == 3:
        row.empty_slices = float(1 - positive.any(axis=(0, 1)).mean())
    if not row.foreground:
        text = f"label '{case.label}' is empty, it holds no foreground."
        report.add(ErrorCode.SITE_DATA, "warning", case.name, text, "Make sure that there is nothing to outline.")
    return positive


def _check_pair(
    report: SiteReport, row: CaseRow, case: Case, image: Picture, label: Picture, positive: NDArray[np.bool_]
) -> None:
    """Compare where the image and its label lie."""
    if image.volume_shape != label.volume_shape:
        upright = " (upright, as its EXIF orientation says)" if any("EXIF" in note for note in image.notes) else ""
        text = (
            f"case '{case.name}': image '{case.image}' has shape {list(image.shape)}{upright}, label "
            f"{list(label.shape)}."
        )
        report.add(ErrorCode.SHAPES_DIFFER, "error", case.name, text, "Resample the label to the image.")
        return
    _count_unseen(report, row, image, positive)
    if image.affine is None or label.affine is None:
        return
    remedy = "Resample the label to the image, or copy the image's header."
    assert image.spacing is not None and label.spacing is not None
    if same_place(image, label):
        return
    where = f"label '{case.label}' and its image differ in"
    if image.orientation != label.orientation:
        text = f"{where} orientation, {label.orientation} and {image.orientation}."
        report.add(ErrorCode.SITE_DATA, "error", case.name, text, remedy)
    elif not np.allclose(image.spacing, label.spacing, rtol=1e-2):
        text = f"{where} spacing, {_steps(label.spacing)} and {_steps(image.spacing)} mm."
        report.add(ErrorCode.SITE_DATA, "error", case.name, text, remedy)
    else:
        report.add(ErrorCode.SITE_DATA, "warning", case.name, f"{where} the affine (position or rotation).", remedy)


def _count_unseen(report: SiteReport, row: CaseRow, image: Picture, positive: NDArray[np.bool_]) -> None:
    if report.field_of_view is not None and not report.colour:
        row.unseen = labelled_outside(positive, image, report.field_of_view)


def _steps(spacing: Iterable[float]) -> str:
    return " x ".join(f"{step:.3g}" for step in spacing)
