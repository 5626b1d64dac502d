"""What is wrong with a site's data, all of it at once, before anything is trained.

A report names cases, files and patients, so it stays at the site; only the code of a finding may leave.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pfedsam.data.case_checks import check_case
from pfedsam.data.datalist_file import unknown_value, wrong
from pfedsam.data.field_of_view import told
from pfedsam.data.known_checks import KnownChecks
from pfedsam.data.listed_split import emptied, listed_split
from pfedsam.data.picture import Picture
from pfedsam.data.sections import SECTIONS, UNLABELLED
from pfedsam.data.site_folder import LAYOUT, Case, Split, misnamed, no_label, read_site, stray_labels
from pfedsam.data.site_report import CaseRow, SiteReport
from pfedsam.data.sites import split_site, without_label
from pfedsam.data.suffixes import SUFFIXES, case_name, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few

#: So many cases with the same warning have a line each.
FEW = 5
#: What `check_site` calls with a case, its section, its image and its label.
Visit = Callable[[Case, str, Picture, Picture], None]


def check_site(
    folder: str | Path,
    labels: Sequence[int] = (0, 1),
    *,
    unknown: Sequence[int] = (),
    minimum_cases: int = 3,
    seed: int = 0,
    folds: int = 3,
    colour: bool = False,
    field_of_view: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    known: Path | None = None,
    visit: Visit | None = None,
) -> SiteReport:
    """Check a site folder and collect every finding; nothing is raised for bad data.

    Args:
        folder: site folder.
        labels: values that a label may hold.
        unknown: those of them that say that nobody knows; what the site's `datalist.json` names is added.
        minimum_cases: fewest cases with a label.
        seed: fold of the split, and draw where there is no datalist.
        folds: number of folds.
        colour: whether the bundle takes colour pictures; else it takes volumes, and pictures as volumes of one slice.
        field_of_view: side in millimetres of the square that the bundle sees, None if it sees all of an image.
        progress: called with (done, total) after each case.
        known: file of what was found of each case before, see `pfedsam.data.known_checks`; None to read all cases.
        visit: called with each case that was read and has no error: its section, "" for none, its image and its label.
    """
    folder = Path(folder)
    report = SiteReport(str(folder), colour=colour, field_of_view=field_of_view)
    _check_files(report, folder)
    try:
        cases = read_site(folder)
    except PFedSAMError as error:
        report.add_error(error)
        return report
    cases, section_of = _check_split(report, folder, cases, seed, folds)
    open_values = _open_values(report, folder, labels, unknown)
    checks = KnownChecks(known, [list(labels), open_values, colour, field_of_view])
    for number, case in enumerate(cases, 1):
        section = section_of.get(case.name, "")
        part = checks.find(case)
        if part is None:
            part = SiteReport(report.folder, cases=[CaseRow(case.name)], colour=colour, field_of_view=field_of_view)
            pictures = check_case(part, case, labels, open_values)
            if visit is not None and pictures is not None and part.ok:
                visit(case, section, *pictures)
        checks.keep(case, part)
        part.cases[0].section = section
        report.take(part)
        if progress:
            progress(number, len(cases))
    checks.save()
    _add_remarks(report)
    _add_unlabelled(report, folder, cases, section_of)
    complete = sum(case.label is not None for case in cases)
    if complete < minimum_cases and not any(finding.code == ErrorCode.TOO_FEW_CASES for finding in report.findings):
        report.add(
            ErrorCode.TOO_FEW_CASES,
            "error",
            "",
            f"'{folder}' holds {complete} case(s) with a label, {minimum_cases} are needed.",
            "Add cases.",
        )
    _check_duplicates(report, section_of)
    _check_geometry(report)
    return report


def _check_files(report: SiteReport, folder: Path) -> None:
    """Warn of files that no case uses."""
    if not (folder / "images").is_dir():
        return
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
    for path in stray_labels(folder):
        text = f"label '{path}' belongs to no image and is ignored."
        name = case_name(path) or ""
        report.add(ErrorCode.SITE_DATA, "warning", name, text, "Name it as its image, or take it away.")


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
            split = split_site([case for case in cases if case.label is not None] or cases, seed, folds)
    except PFedSAMError as error:
        report.add_error(error)
    section_of: dict[str, str] = {}
    by_name = {case.name: case for case in cases}
    for section, members in split.items():
        for case in members:
            section_of.setdefault(case.name, section)
            by_name[case.name] = case
    for case in without_label(list(by_name.values()), split):
        section_of[case.name] = UNLABELLED
    unused = [case.name for case in cases if case.name not in section_of and case.label] if section_of else []
    if unused:
        text = f"'{folder / 'datalist.json'}' leaves out {len(unused)} case(s): {few(unused)}."
        report.add(
            ErrorCode.WRONG_SPLIT, "warning", "", text, f"Add them with `pfedsam split {folder}` if they shall be used."
        )
    return sorted(by_name.values(), key=lambda case: case.name), section_of


def _open_values(report: SiteReport, folder: Path, labels: Sequence[int], unknown: Sequence[int]) -> list[int]:
    """The label values of voxels of which nobody knows what they are."""
    try:
        own = unknown_value(folder)
    except PFedSAMError:  # told by the split
        own = None
    if own in set(labels) - set(unknown):
        report.add_error(wrong(folder, f"the label value {own} is unknown and a class", "Take another value."))
    return sorted({*unknown, *([] if own is None else [own])})


def _add_unlabelled(report: SiteReport, folder: Path, cases: Sequence[Case], section_of: Mapping[str, str]) -> None:
    """Cases without a label: an error where they may be misnamed, or are to be measured on; else told of."""
    without = [case for case in cases if case.label is None]
    if not without or len(without) == len(cases):
        for case in without:
            report.add_error(no_label(folder, case), case.name)
        return
    if strays := stray_labels(folder):
        report.add_error(misnamed(folder, without[0], strays), without[0].name)
        return
    for case in without:
        if section_of.get(case.name, UNLABELLED) not in (UNLABELLED, SECTIONS[0]):
            report.add_error(no_label(folder, case), case.name)
    names = [case.name for case in without if section_of.get(case.name) == UNLABELLED]
    others = len(without) - len(names)
    also = f"; {others} more of patients in validation or test are left out" if others else ""
    text = f"{len(without)} of {len(cases)} cases have no label ({few(case.name for case in without)}){also}."
    remedy = "A strategy with pseudo-labels trains on them, others do not. Add the labels if there are some."
    report.add(ErrorCode.MISSING_LABEL, "warning", "", text, remedy)


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


def _add_unseen(report: SiteReport) -> None:
    """Cases with labelled voxels that the bundle does not see: each, or all in one where there are many."""
    rows = [row for row in report.cases if row.unseen]
    unit = "pixels" if all(row.spacing is None for row in rows) else "voxels"
    where = (
        f"lie outside the bundle's field of view of {report.field_of_view:g} mm: they are neither trained nor found."
    )
    remedy = "Restore the spacing if it was lost, or set a larger one with --set field_of_view_mm=..."
    if len(rows) > FEW:
        worst = max(rows, key=lambda row: row.unseen / row.foreground)
        names = few(row.name for row in sorted(rows, key=lambda row: -row.unseen / row.foreground))
        text = (
            f"{len(rows)} case(s) ({names}): up to {worst.unseen / worst.foreground:.0%} of the labelled {unit} {where}"
        )
        report.add(ErrorCode.SITE_DATA, "warning", "", text, remedy)
        return
    for row in rows:
        text = f"case '{row.name}': {row.unseen} labelled {unit}, {row.unseen / row.foreground:.0%}, {where}"
        report.add(ErrorCode.SITE_DATA, "warning", row.name, text, remedy)


def _check_duplicates(report: SiteReport, section_of: dict[str, str]) -> None:
    alike: dict[str, list[str]] = defaultdict(list)
    for name, content in report.contents.items():
        alike[content].append(name)
    for names in alike.values():
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
