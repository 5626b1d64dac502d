"""How the cases of a site are split by patient, and what bundles load of them.

Without a written split the section of a patient follows from the patient's name and the seed alone, see
`pfedsam.data.sections.section_by_key`: one patient more or less moves no other. With few patients a section may be
empty; then, and wherever the numbers shall be even, `pfedsam split` writes a split and extends it for new patients.

Cases without a label are in no section: nothing can be measured on them. They may be trained on as far as their
patients are in neither validation nor test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedsam.data.listed_split import emptied, listed_split
from pfedsam.data.sections import FOLDS, SECTIONS, UNLABELLED, VALIDATION_FRACTION, section_by_key
from pfedsam.data.site_folder import Case, Split, labelled_cases, read_site, require_label
from pfedsam.data.suffixes import NIFTI, SUFFIXES, case_name, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.files import write_atomically


def site_images(folder: str | Path) -> list[dict[str, str]]:
    """All images of a site as MONAI data dictionaries with the key `image`, sorted by case; labels are not needed.

    Raises:
        PFedSAMError: E02 if there is none; E09 for a file that is none of the known formats, or two of one name.
    """
    cases = read_site(folder)
    left_out = sorted(set(visible(Path(folder) / "images")) - {case.image for case in cases})
    if left_out:
        raise PFedSAMError(
            ErrorCode.SITE_DATA,
            f"{few(str(path) for path in left_out)}: no image of a known format.",
            f"Take it out of the folder, or convert it to one of {', '.join(SUFFIXES)}.",
        )
    return [{"image": str(case.image)} for case in cases]


def result_name(metadata: Mapping[str, Any], saver: Any) -> dict[str, Any]:
    """How MONAI's `SaveImage` names a result: by the case, whatever capitals or dots the name of its image has."""
    path = Path(str(metadata["filename_or_obj"]))
    return {"subject": f"{case_name(path) or path.name}{NIFTI[0]}", "idx": metadata.get("patch_index")}


def split_site(
    cases: Sequence[Case], seed: int, folds: int = FOLDS, validation_fraction: float = VALIDATION_FRACTION
) -> Split:
    """Split cases by patient into training, validation and test, each patient by its name alone.

    Args:
        cases: the cases of one site.
        seed: fold and draw, see `pfedsam.data.sections.section_by_key`.
        folds: number of folds, at least 2.
        validation_fraction: expected share of the patients outside the test fold, between 0 and 1.

    Raises:
        PFedSAMError: E06 if a section is empty, as it may be with few patients; E16 if a setting makes no sense.
    """
    split: Split = {section: [] for section in SECTIONS}
    for case in sorted(cases, key=lambda case: case.name):
        split[section_by_key(case.patient, seed, folds, validation_fraction)].append(case)
    empty = [section for section, members in split.items() if not members]
    if empty:
        patients = len({case.patient for case in cases})
        images = f" in '{cases[0].image.parent}'" if cases else ""
        site = str(cases[0].image.parent.parent) if cases else "<site>"
        raise PFedSAMError(
            ErrorCode.TOO_FEW_CASES,
            f"{patients} patient(s){images} leave {' and '.join(empty)} empty with seed {seed} and {folds} folds.",
            f"Write an even split with `pfedsam split {site}`, or add cases.",
        )
    return split


def read_split(folder: str | Path, seed: int = 0, folds: int = FOLDS) -> Split:
    """The split of a site's labelled cases: by its `datalist.json` if that has sections or folds, else by `split_site`.

    Raises:
        PFedSAMError: as `read_site` and `split_site`, E03 where a label is missing, see `labelled_cases`, or a case for
            validation or test has none, and E08 for the first thing wrong in `datalist.json`.
    """
    folder = Path(folder)
    split = listed_split(folder, seed)
    if split is None:
        return split_site(labelled_cases(folder, read_site(folder)), seed, folds)
    sections, problems = split
    for problem in problems or emptied(folder, sections):
        raise problem
    for case in (case for section in SECTIONS[1:] for case in sections[section]):
        require_label(folder, case)
    return {**sections, SECTIONS[0]: labelled_cases(folder, sections[SECTIONS[0]])}


def unlabelled(folder: str | Path, seed: int = 0, folds: int = FOLDS) -> list[Case]:
    """The cases without a label that may be trained on: none of a patient in validation or test.

    Args:
        folder, seed, folds: of the split, as in `read_split`.

    Raises:
        PFedSAMError: as `read_split`.
    """
    folder, split = Path(folder), read_split(folder, seed, folds)
    listed = listed_split(folder, seed)
    cases = {case.name: case for case in read_site(folder)}
    if listed is not None:
        cases |= {case.name: case for case in listed[0][SECTIONS[0]]}
    return without_label(list(cases.values()), split)


def without_label(cases: Sequence[Case], split: Split) -> list[Case]:
    """The cases without a label of patients in neither validation nor test, sorted by name."""
    kept = {case.patient for section in SECTIONS[1:] for case in split.get(section, [])}
    return sorted(
        (case for case in cases if case.label is None and case.patient not in kept), key=lambda case: case.name
    )


def datalist(folder: str | Path, section: str, seed: int = 0, folds: int = FOLDS) -> list[dict[str, str]]:
    """One section of a site as MONAI data dictionaries.

    Args:
        folder: site folder.
        section: `training`, `validation` or `test`; a `datalist.json` without `test` gives an empty list. Or
            `unlabelled`, see `pfedsam.data.sites.unlabelled`.
        seed: fold, and draw where there is no datalist.
        folds: number of folds where there is no datalist.

    Returns:
        Dictionaries with the keys `image` and `label` (paths; no label where there is none), `case` and `patient`.

    Raises:
        PFedSAMError: as `read_split`, and E28 for an unknown section.
    """
    known = [*SECTIONS, UNLABELLED]
    if section not in known:
        message = f"there is no section '{section}' of a site."
        raise PFedSAMError(ErrorCode.UNKNOWN_NAME, message, f"Use one of {known}.")
    if section == UNLABELLED:
        cases = unlabelled(folder, seed, folds)
        return [{"image": str(case.image), "case": case.name, "patient": case.patient} for case in cases]
    return [
        {"image": str(case.image), "label": str(case.label), "case": case.name, "patient": case.patient}
        for case in read_split(folder, seed, folds)[section]
    ]


def write_split(folder: str | Path, path: str | Path, seed: int = 0, folds: int = FOLDS) -> dict[str, Any]:
    """Write the split of a site as readable JSON: case names of each section, seed, folds and where it comes from.

    It names cases, so it stays at the site.

    Returns:
        What was written.

    Raises:
        PFedSAMError: as `read_split`.
    """
    folder, path = Path(folder), Path(path)
    split = read_split(folder, seed, folds)
    source = "seed" if listed_split(folder) is None else "datalist.json"
    content: dict[str, Any] = {"source": source, "seed": seed, "folds": folds}
    content |= {section: [case.name for case in split[section]] for section in SECTIONS}
    without = unlabelled(folder, seed, folds)
    if without:
        content[UNLABELLED] = [case.name for case in without]
    every = [*(case for cases in split.values() for case in cases), *without]
    patients = {case.name: case.patient for case in every if case.patient != case.name}
    if patients:
        content["patients"] = patients
    write_atomically(path, f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())
    return content
