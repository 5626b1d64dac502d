"""What is wrong with a site's data, all of it at once, before anything is trained.

A report names cases, files and patients, so it stays at the site; only the code of a finding may leave.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pfedsam.data.pictures import NIFTI, Picture, load_picture, visible
from pfedsam.data.sites import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    LAYOUT,
    Case,
    Split,
    case_name,
    listed_split,
    read_site,
    split_site,
)
from pfedsam.errors import PFedSAMError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a site.

    Args:
        code: a key of `pfedsam.errors.CODES`.
        severity: an `error` forbids training, a `warning` should be looked at, a `note` is for information.
        case: case name, or "" if it concerns the site.
        message: what was found where.
        remedy: what to do next.
    """

    code: str
    severity: Severity
    case: str
    message: str
    remedy: str = ""


@dataclass
class CaseRow:
    """What one case holds.

    Args:
        name: case name.
        section: section of the split, or "" if it is in none.
        shape: voxels of each axis.
        spacing: millimetres of each axis, or None for a format that has none.
        orientation: axis codes, for example `RAS`, or "".
        dtype: data type of the image file.
        label_values: values of the label, after 0/255 is mapped.
        foreground: label voxels above 0.
        empty_slices: share of the slices (last axis) without foreground, or None for a 2-D image.
        intensity: least and greatest finite value of the image, or None.
    """

    name: str
    section: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] | None = None
    orientation: str = ""
    dtype: str = ""
    label_values: tuple[float, ...] = ()
    foreground: int = 0
    empty_slices: float | None = None
    intensity: tuple[float, float] | None = None


@dataclass
class SiteReport:
    """Everything that was found in a site folder."""

    folder: str
    findings: list[Finding] = field(default_factory=list)
    cases: list[CaseRow] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings that forbid training."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries and lists, for JSON."""
        return {"folder": self.folder, "ok": self.ok} | {key: asdict(self)[key] for key in ("findings", "cases")}

    def add(self, code: str, severity: Severity, case: str, message: str, remedy: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(code, severity, case, message, remedy))

    def add_error(self, error: PFedSAMError, case: str = "") -> None:
        """Add an error that was raised, once."""
        if not any(finding.message == error.message for finding in self.findings):
            self.add(error.code, "error", case, error.message, error.remedy)


def check_site(
    folder: str | Path,
    labels: Sequence[int] = (0, 1),
    *,
    minimum_cases: int = 3,
    seed: int = 0,
    folds: int = 3,
) -> SiteReport:
    """Check a site folder and collect every finding; nothing is raised for bad data.

    Args:
        folder: site folder.
        labels: values that a label may hold.
        minimum_cases: fewest cases with a label.
        seed: fold and draw of the split, where there is no datalist.
        folds: number of folds.
    """
    folder = Path(folder)
    report = SiteReport(str(folder))
    _check_files(report, folder)
    try:
        cases = read_site(folder, require_labels=False)
    except PFedSAMError as error:
        report.add_error(error)
        return report
    cases, section_of = _check_split(report, folder, cases, seed, folds)
    hashes: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        row = CaseRow(case.name, section_of.get(case.name, ""))
        report.cases.append(row)
        _check_case(report, row, case, labels, hashes)
    complete = sum(case.label is not None for case in cases)
    if complete < minimum_cases and not any(finding.code == "E06" for finding in report.findings):
        report.add(
            "E06",
            "error",
            "",
            f"'{folder}' holds {complete} case(s) with a label, {minimum_cases} are needed.",
            "Add cases.",
        )
    _check_duplicates(report, hashes, section_of)
    _check_geometry(report)
    return report


def require_valid(report: SiteReport) -> None:
    """Raise the first error of a report, with the count of the others.

    Raises:
        PFedSAMError: with the code, the sentence and the remedy of the first error.
    """
    if report.errors:
        first, *others = report.errors
        more = f" (and {len(others)} more)" if others else ""
        raise PFedSAMError(first.code, first.message + more, first.remedy)


def _check_files(report: SiteReport, folder: Path) -> None:
    """Warn of files that no case uses."""
    if not (folder / "images").is_dir():
        return
    names = {case_name(path) for path in (folder / "images").iterdir()}
    for path in visible(folder / "images"):
        if case_name(path) is None:
            expected = "Convert it to one of " + ", ".join(IMAGE_SUFFIXES) + "."
            report.add("E09", "warning", "", f"'{path}' is no image of a known format and is ignored.", expected)
    if not (folder / "labels").is_dir():
        report.add("E03", "error", "", f"site folder '{folder}': there is no folder '{folder / 'labels'}'.", LAYOUT)
    for path in visible(folder / "labels"):
        name = case_name(path, LABEL_SUFFIXES)
        if name not in names or name is None:
            text = f"label '{path}' belongs to no image and is ignored."
            report.add("E09", "warning", name or "", text, "Name it as its image, or take it away.")


def _check_split(
    report: SiteReport, folder: Path, cases: list[Case], seed: int, folds: int
) -> tuple[list[Case], dict[str, str]]:
    """The cases, with those that only the datalist names, and the section of each."""
    split: Split = {}
    try:
        listed = listed_split(folder)
        if listed is not None:
            split, problems = listed
            for problem in problems:
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
        text = f"'{folder / 'datalist.json'}' leaves out {len(unused)} case(s): {_few(unused)}."
        report.add("E08", "warning", "", text, "Add them to a section if they shall be used.")
    return sorted(by_name.values(), key=lambda case: case.name), section_of


def _check_case(
    report: SiteReport, row: CaseRow, case: Case, labels: Sequence[int], hashes: dict[str, list[str]]
) -> None:
    image = _load(report, case, case.image)
    if image is not None:
        row.shape, row.spacing, row.orientation = image.shape, image.spacing, image.orientation
        row.dtype = str(image.values.dtype)
        _check_intensity(report, row, case, image)
        content = hashlib.sha256(f"{image.values.dtype}{image.values.shape}".encode())
        content.update(np.ascontiguousarray(image.values).tobytes())
        hashes[content.hexdigest()].append(case.name)
    if case.label is None:
        looked = ", ".join(f"{case.name}{end}" for end in LABEL_SUFFIXES)
        folder = Path(report.folder) / "labels"
        text = f"case '{case.name}' has no label: looked for {looked} in '{folder}'."
        report.add("E03", "error", case.name, text, "Add the label or take the image away.")
        return
    label = _load(report, case, case.label)
    if label is None:
        return
    _check_label(report, row, case, label, labels)
    if image is not None:
        _check_pair(report, case, image, label)


def _load(report: SiteReport, case: Case, path: Path) -> Picture | None:
    try:
        picture = load_picture(path)
        if picture.values.size == 0 or picture.values.dtype.kind not in "buif":
            raise ValueError(f"it holds {picture.values.dtype}{list(picture.values.shape)}")
        return picture
    # a reader may raise anything for a corrupt file, and the check must go on
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        text = f"'{path}' cannot be read: {reason}."
        report.add("E05", "error", case.name, text, "Export the file again, or take the case away.")
        return None


def _check_intensity(report: SiteReport, row: CaseRow, case: Case, image: Picture) -> None:
    finite = image.values[np.isfinite(image.values)]
    if finite.size < image.values.size:
        text = f"image '{case.image}' holds {image.values.size - finite.size} value(s) that are not finite."
        report.add("E09", "error", case.name, text, "Export the image again, or replace these values.")
    if finite.size:
        row.intensity = (float(finite.min()), float(finite.max()))
        if row.intensity[0] == row.intensity[1]:
            text = f"image '{case.image}' is constant, every value is {row.intensity[0]:g}."
            report.add("E09", "error", case.name, text, "Export the image again, or take the case away.")


def _check_label(report: SiteReport, row: CaseRow, case: Case, label: Picture, labels: Sequence[int]) -> None:
    values = label.values
    if values.ndim > len(label.shape):
        if (values != values[..., :1]).any():
            text = f"label '{case.label}' has {values.shape[-1]} different channels, expected one."
            report.add("E07", "error", case.name, text, "Store the label as one channel of integers.")
            return
        values = values[..., 0]
    found = np.unique(values)
    flat = case.label is not None and not case.label.name.lower().endswith(NIFTI)
    if flat and 255 in found and 255 not in labels and set(found.tolist()) <= {0, 255}:
        values, found = values // 255, found // 255
        report.add("E07", "note", case.name, f"label '{case.label}' holds 0 and 255: 255 is read as 1.")
    row.label_values = tuple(float(value) for value in found[:256])
    wrong = [float(value) for value in found if value not in labels]
    if wrong:
        text = f"label '{case.label}' holds {_few(f'{value:g}' for value in wrong)}, expected only {list(labels)}."
        report.add("E07", "error", case.name, text, "Correct the label, or map its values to the bundle's.")
    positive = values > 0
    row.foreground = int(positive.sum())
    if positive.ndim == 3:
        row.empty_slices = float(1 - positive.any(axis=(0, 1)).mean())
    if not row.foreground:
        text = f"label '{case.label}' is empty, it holds no foreground."
        report.add("E09", "warning", case.name, text, "Make sure that there is nothing to outline.")


def _check_pair(report: SiteReport, case: Case, image: Picture, label: Picture) -> None:
    """Compare where the image and its label lie."""
    if _squeezed(image.shape) != _squeezed(label.shape):
        text = f"case '{case.name}': image '{case.image}' has shape {list(image.shape)}, label {list(label.shape)}."
        report.add("E04", "error", case.name, text, "Resample the label to the image.")
        return
    if image.affine is None or label.affine is None:
        return
    remedy = "Resample the label to the image, or copy the image's header."
    assert image.spacing is not None and label.spacing is not None
    where = f"label '{case.label}' and its image differ in"
    if image.orientation != label.orientation:
        text = f"{where} orientation, {label.orientation} and {image.orientation}."
        report.add("E09", "error", case.name, text, remedy)
    elif len(image.spacing) == len(label.spacing) and not np.allclose(image.spacing, label.spacing, rtol=1e-2):
        text = f"{where} spacing, {_steps(label.spacing)} and {_steps(image.spacing)} mm."
        report.add("E09", "error", case.name, text, remedy)
    elif not np.allclose(image.affine, label.affine, atol=0.1 * min(image.spacing)):
        report.add("E09", "warning", case.name, f"{where} the affine (position or rotation).", remedy)


def _check_duplicates(report: SiteReport, hashes: dict[str, list[str]], section_of: dict[str, str]) -> None:
    for names in hashes.values():
        if len(names) < 2:
            continue
        sections = sorted({section_of[name] for name in names if name in section_of})
        if len(sections) > 1:
            text = f"leakage: the cases {_few(names)} hold the same image and are in the sections {sections}."
            report.add("E08", "error", names[0], text, "Keep one of them, or give them one patient in datalist.json.")
        else:
            text = f"the cases {_few(names)} hold the same image."
            report.add("E09", "warning", names[0], text, "Keep one of them.")


def _check_geometry(report: SiteReport) -> None:
    """Compare orientation and spacing over the cases."""
    rows = [row for row in report.cases if row.shape]
    orientations = Counter(row.orientation for row in rows if row.orientation)
    if len(orientations) > 1:
        counts = ", ".join(f"{code} in {count}" for code, count in orientations.most_common())
        text = f"the cases of '{report.folder}' differ in orientation: {counts}."
        report.add("E09", "warning", "", text, "Let the bundle's transforms reorient them, or export them alike.")
    if rows and all(row.spacing is None for row in rows):
        report.add("E09", "note", "", "no case has a pixel size: distances are in pixels.")
    elif rows and all(row.spacing is None or np.allclose(row.spacing, 1) for row in rows):
        text = "every case has a spacing of 1 mm, which is what a lost spacing looks like: distances are in voxels."
        report.add("E09", "note", "", text, "Restore the spacing if it is known.")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1,) else shape


def _steps(spacing: Iterable[float]) -> str:
    return " x ".join(f"{step:.3g}" for step in spacing)


def _few(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
