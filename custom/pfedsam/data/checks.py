"""What is wrong with a site's data, all of it at once, before anything is trained.

A report names cases, files and patients, so it stays at the site; only the code of a finding may leave.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.field_of_view import labelled_outside, share_outside, told
from pfedsam.data.geometry import same_place, turned_onto
from pfedsam.data.intensity import NO_WINDOW, window_is_empty
from pfedsam.data.labels import black_and_white, found_values
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.data.site_report import CaseRow, SiteReport
from pfedsam.data.sites import LAYOUT, Case, Split, emptied, listed_split, no_label, read_site, split_site
from pfedsam.data.suffixes import SUFFIXES, case_name, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few

#: So many cases with the same warning have a line each.
FEW = 5


def check_site(
    folder: str | Path,
    labels: Sequence[int] = (0, 1),
    *,
    minimum_cases: int = 3,
    seed: int = 0,
    folds: int = 3,
    colour: bool = False,
    field_of_view: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SiteReport:
    """Check a site folder and collect every finding; nothing is raised for bad data.

    Args:
        folder: site folder.
        labels: values that a label may hold.
        minimum_cases: fewest cases with a label.
        seed: fold of the split, and draw where there is no datalist.
        folds: number of folds.
        colour: whether the bundle takes colour pictures; else it takes volumes, and pictures as volumes of one slice.
        field_of_view: side in millimetres of the square that the bundle sees, None if it sees all of an image.
        progress: called with (done, total) after each case.
    """
    folder = Path(folder)
    report = SiteReport(str(folder), colour=colour, field_of_view=field_of_view)
    _check_files(report, folder)
    try:
        cases = read_site(folder, require_labels=False)
    except PFedSAMError as error:
        report.add_error(error)
        return report
    cases, section_of = _check_split(report, folder, cases, seed, folds)
    hashes: dict[str, list[str]] = defaultdict(list)
    for number, case in enumerate(cases, 1):
        row = CaseRow(case.name, section_of.get(case.name, ""))
        report.cases.append(row)
        _check_case(report, row, case, labels, hashes)
        if progress:
            progress(number, len(cases))
    _add_remarks(report)
    complete = sum(case.label is not None for case in cases)
    if complete < minimum_cases and not any(finding.code == ErrorCode.TOO_FEW_CASES for finding in report.findings):
        report.add(
            ErrorCode.TOO_FEW_CASES,
            "error",
            "",
            f"'{folder}' holds {complete} case(s) with a label, {minimum_cases} are needed.",
            "Add cases.",
        )
    _check_duplicates(report, hashes, section_of)
    _check_geometry(report)
    return report


def _check_files(report: SiteReport, folder: Path) -> None:
    """Warn of files that no case uses."""
    if not (folder / "images").is_dir():
        return
    names = {case_name(path) for path in (folder / "images").iterdir()}
    for path in visible(folder / "images"):
        if case_name(path) is None:
            expected = "Convert it to one of " + ", ".join(SUFFIXES) + "."
            report.add(
                ErrorCode.SITE_DATA, "warning", "", f"'{path}' is no image of a known format and is ignored.", expected
            )
    if not (folder / "labels").is_dir():
        report.add(
            ErrorCode.MISSING_LABEL,
            "error",
            "",
            f"site folder '{folder}': there is no folder '{folder / 'labels'}'.",
            LAYOUT,
        )
    for path in visible(folder / "labels"):
        name = case_name(path)
        if name not in names or name is None:
            text = f"label '{path}' belongs to no image and is ignored."
            report.add(ErrorCode.SITE_DATA, "warning", name or "", text, "Name it as its image, or take it away.")


def _check_split(
    report: SiteReport, folder: Path, cases: list[Case], seed: int, folds: int
) -> tuple[list[Case], dict[str, str]]:
    """The cases, with those that only the datalist names, and the section of each."""
    split: Split = {}
    try:
        listed = listed_split(folder, seed)
        if listed is not None:
            split, problems = listed
            for problem in problems or emptied(folder, split):
                report.add_error(problem)
        else:
            split = split_site(cases, seed, folds)
    except PFedSAMError as error:
        report.add_error(error)
    section_of: dict[str, str] = {}
    by_name = {case.name: case for case in cases}
    for section, members in split.items():
        for case in members:
            section_of.setdefault(case.name, section)
            by_name[case.name] = case
    unused = [case.name for case in cases if case.name not in section_of] if section_of else []
    if unused:
        text = f"'{folder / 'datalist.json'}' leaves out {len(unused)} case(s): {few(unused)}."
        report.add(
            ErrorCode.WRONG_SPLIT, "warning", "", text, f"Add them with `pfedsam split {folder}` if they shall be used."
        )
    return sorted(by_name.values(), key=lambda case: case.name), section_of


def _check_case(
    report: SiteReport, row: CaseRow, case: Case, labels: Sequence[int], hashes: dict[str, list[str]]
) -> None:
    image = _load(report, case, case.image)
    if image is not None:
        row.shape, row.spacing, row.orientation = image.shape, image.spacing, image.orientation
        row.dtype = str(image.values.dtype)
        _check_intensity(report, row, case, image)
        _check_fit(report, case, image)
        content = hashlib.sha256(f"{image.values.dtype}{image.values.shape}".encode())
        content.update(np.ascontiguousarray(image.values.T).data.cast("B"))
        hashes[content.hexdigest()].append(case.name)
    if case.label is None:
        report.add_error(no_label(Path(report.folder), case), case.name)
        return
    label = _load(report, case, case.label, label=True)
    if label is None:
        return
    if image is not None:
        turned = turned_onto(image, label)
        if turned is not label:
            report.remark("the label is stored in another order of the axes, and is turned as its image", case.name)
        label = turned
    positive = _check_label(report, row, case, label, labels)
    if image is not None:
        _check_pair(report, row, case, image, label, positive)


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
        text = f"image '{case.image}' {what}, and the bundle takes colour pictures."
        report.add(
            ErrorCode.UNREADABLE_IMAGE,
            "error",
            case.name,
            text,
            "Choose a bundle for volumes (--bundle brain_lesion_mri).",
        )
        return
    if not report.colour and image.is_colour:
        report.remark(
            "a colour picture, which this bundle for volumes reads as one grey slice of 1 mm pixels; one that sees "
            "colours: pfedsam new-bundle <name> --classes <names> --modality rgb",
            case.name,
        )
    if report.field_of_view is not None:
        share = share_outside(image, report.field_of_view)
        if share >= 0.005:
            report.outside[case.name] = share


def _add_remarks(report: SiteReport) -> None:
    """What was remarked of several cases, each once."""
    for text, names in report.remarks.items():
        report.add(ErrorCode.SITE_DATA, "note", "", f"{len(names)} case(s) ({few(names)}): {text}.")
    if report.field_of_view is None:
        return
    _add_unseen(report)
    if report.outside:
        most = max(report.outside.values())
        report.add(
            ErrorCode.SITE_DATA,
            "warning" if most >= 0.25 else "note",
            "",
            f"{len(report.outside)} case(s) ({few(report.outside)}): up to {told(most, report.field_of_view)}.",
        )


def _check_label(
    report: SiteReport, row: CaseRow, case: Case, label: Picture, labels: Sequence[int]
) -> NDArray[np.bool_]:
    """Returns where the label is not background."""
    values, found = label.values, found_values(label.values)
    white = black_and_white(found, labels)
    if white is not None:
        found = [value // white for value in found]
        report.add(
            ErrorCode.LABEL_OUT_OF_RANGE,
            "note",
            case.name,
            f"label '{case.label}' holds 0 and {white}: {white} is read as 1.",
        )
    row.label_values = tuple(float(value) for value in found[:256])
    wrong = [value for value in found if value not in labels]
    if wrong:
        text = f"label '{case.label}' holds {few(map(str, wrong))}, expected only {list(labels)}."
        report.add(
            ErrorCode.LABEL_OUT_OF_RANGE,
            "error",
            case.name,
            text,
            "Correct the label, or map its values to the bundle's.",
        )
    positive = values > 0
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


def _add_unseen(report: SiteReport) -> None:
    """Cases with labelled voxels that the bundle does not see: each, or all in one where there are many."""
    rows = [row for row in report.cases if row.unseen]
    where = (
        f"lie outside the bundle's field of view of {report.field_of_view:g} mm: they are neither trained nor found."
    )
    remedy = "Restore the spacing if it was lost, or set a larger one with --set field_of_view_mm=..."
    if len(rows) > FEW:
        worst = max(rows, key=lambda row: row.unseen / row.foreground)
        names = few(row.name for row in sorted(rows, key=lambda row: -row.unseen / row.foreground))
        text = (
            f"{len(rows)} case(s) ({names}): up to {worst.unseen / worst.foreground:.0%} of the labelled voxels {where}"
        )
        report.add(ErrorCode.SITE_DATA, "warning", "", text, remedy)
        return
    for row in rows:
        text = f"case '{row.name}': {row.unseen} labelled voxel(s), {row.unseen / row.foreground:.0%}, {where}"
        report.add(ErrorCode.SITE_DATA, "warning", row.name, text, remedy)


def _check_duplicates(report: SiteReport, hashes: dict[str, list[str]], section_of: dict[str, str]) -> None:
    for names in hashes.values():
        if len(names) < 2:
            continue
        sections = sorted({section_of[name] for name in names if name in section_of})
        if len(sections) > 1:
            text = f"leakage: the cases {few(names)} hold the same image and are in the sections {sections}."
            report.add(
                ErrorCode.WRONG_SPLIT,
                "error",
                names[0],
                text,
                "Keep one of them, or give them one patient in datalist.json.",
            )
        else:
            text = f"the cases {few(names)} hold the same image."
            report.add(ErrorCode.SITE_DATA, "warning", names[0], text, "Keep one of them.")


def _check_geometry(report: SiteReport) -> None:
    """Compare orientation and spacing over the cases."""
    rows = [row for row in report.cases if row.shape]
    orientations = Counter(row.orientation for row in rows if row.orientation)
    if len(orientations) > 1:
        counts = ", ".join(f"{code} in {count}" for code, count in orientations.most_common())
        text = f"the cases of '{report.folder}' differ in orientation: {counts}."
        report.add(
            ErrorCode.SITE_DATA, "warning", "", text, "Let the bundle's transforms reorient them, or export them alike."
        )
    if rows and all(row.spacing is None for row in rows):
        report.add(ErrorCode.SITE_DATA, "note", "", "no case has a pixel size: distances are in pixels.")
    elif rows and all(row.spacing is None or np.allclose(row.spacing, 1) for row in rows):
        text = "every case has a spacing of 1 mm, which is what a lost spacing looks like: distances are in voxels."
        report.add(ErrorCode.SITE_DATA, "note", "", text, "Restore the spacing if it is known.")


def _steps(spacing: Iterable[float]) -> str:
    return " x ".join(f"{step:.3g}" for step in spacing)
