"""A site folder, the one input format, and how its cases are split by patient.

    <site>/images/<case>.nii.gz | .nii | .png | .jpg | .jpeg | .tif | .tiff | .bmp | .dcm   or a folder of DICOM slices
    <site>/labels/<case>                                               the same case name and formats, integer labels
    <site>/datalist.json                                               optional

Without a written split the section of a patient follows from the patient's name and the seed alone, see
`pfedsam.data.sections.section_by_key`: one patient more or less moves no other. With few patients a section may be
empty; then, and wherever the numbers shall be even, `pfedsam split` writes a split and extends it for new patients.
What the file holds: `pfedsam.data.datalist_file`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedsam.data.datalist_file import entry_name, listed_parts, read_content, wrong
from pfedsam.data.sections import FOLDS, SECTIONS, VALIDATION_FRACTION, section_by_key
from pfedsam.data.suffixes import NIFTI, SUFFIXES, case_name, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.files import write_atomically
from pfedsam.settings import shown

LAYOUT = f"Expected <site>/images/<case> and <site>/labels/<case>, each {'|'.join(SUFFIXES)} or a DICOM folder."

Split = dict[str, list["Case"]]


@dataclass(frozen=True)
class Case:
    """One image of a site, a volume or a 2-D image, with its label.

    Args:
        name: file name without suffix; the same for image and label.
        image: image file, or folder of DICOM slices.
        label: label file, or None if there is none.
        patient: whose image it is; the case name where nothing else is known.
    """

    name: str
    image: Path
    label: Path | None
    patient: str


def site_names(data: Path) -> tuple[str, ...]:
    """Names of the site folders in a folder, sorted: those that hold a folder `images`."""
    return tuple(sorted(path.parent.name for path in data.glob("*/images") if path.is_dir()))


def sites_in(data: Path) -> list[Path]:
    """The site folders that a path means: itself, or those that it holds.

    Raises:
        PFedSAMError: E02 if there is none.
    """
    if (data / "images").is_dir():
        return [data]
    names = site_names(data)
    if not names:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"'{data}' is no site folder and holds none.", LAYOUT)
    return [data / name for name in names]


def read_site(folder: str | Path, require_labels: bool = True) -> list[Case]:
    """The cases of a site folder, sorted by name.

    Args:
        folder: site folder.
        require_labels: whether a case without a label is an error.

    Raises:
        PFedSAMError: E02 if the folder or its images are missing, E03 for a case without a label, E08 for a
            `datalist.json` that is not readable, E09 if two images or two labels have one case name.
    """
    folder = Path(folder)
    images = folder / "images"
    if not images.is_dir():
        missing = images if folder.is_dir() else folder
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"site folder '{folder}': there is no folder '{missing}'.", LAYOUT)
    patients = read_content(folder).get("patients", {})
    labels = files_by_name(folder / "labels", "labels")
    cases = {
        name: Case(name, path, labels.get(name), str(patients.get(name, name)))
        for name, path in files_by_name(images, "images").items()
    }
    if not cases:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"site folder '{folder}': there is no image in '{images}'.", LAYOUT)
    if require_labels:
        for case in cases.values():
            _require_label(folder, case)
    return sorted(cases.values(), key=lambda case: case.name)


def site_images(folder: str | Path) -> list[dict[str, str]]:
    """All images of a site as MONAI data dictionaries with the key `image`, sorted by case; labels are not needed.

    Raises:
        PFedSAMError: E02 if there is none; E09 for a file that is none of the known formats, or two of one name.
    """
    cases = read_site(folder, require_labels=False)
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
    """The split of a site: by its `datalist.json` if that has sections or folds, else by `split_site`.

    Raises:
        PFedSAMError: as `read_site` and `split_site`, and E08 for the first thing wrong in `datalist.json`.
    """
    folder = Path(folder)
    split = listed_split(folder, seed)
    if split is None:
        return split_site(read_site(folder), seed, folds)
    sections, problems = split
    for problem in problems or emptied(folder, sections):
        raise problem
    for case in (case for cases in sections.values() for case in cases):
        _require_label(folder, case)
    return sections


def listed_split(
    folder: str | Path, seed: int = 0, content: dict[str, Any] | None = None
) -> tuple[Split, list[PFedSAMError]] | None:
    """The sections of `datalist.json` with everything that is wrong in it, or None if there are no sections.

    Args:
        folder: site folder.
        seed: chooses the fold, if there are folds. What is wrong in the others is told, too.
        content: of the file, if it shall be another than what is there.

    Raises:
        PFedSAMError: E08 if the file is not readable; E02 or E09 as `read_site`.
    """
    folder = Path(folder)
    content = read_content(folder) if content is None else content
    parts = listed_parts(content)
    if not parts:
        return None
    named = any(_has_names(part) for part in parts.values())
    known = {case.name: case for case in read_site(folder, require_labels=False)} if named else {}
    listing = _Listing(folder, content, known, files_by_name(folder / "labels", "labels"))
    read = [listing.read(part, told) for told, part in parts.items()]
    problems = [*(problem for _, found in read for problem in found), *_differing(folder, parts)]
    # what is wrong in all folds is told once
    return read[seed % len(read)][0], list({error.message: error for error in problems}.values())


def emptied(folder: str | Path, sections: Split) -> list[PFedSAMError]:
    """The error of a listed split that cannot train because all images of a section are absent; else none.

    It is apart from what is wrong in the file: other folds can train, and `pfedsam split` can extend it.
    """
    empty = [section for section in ("training", "validation") if not sections[section]]
    what = f"the images of all cases for {' and '.join(empty)} are absent"
    remedy = f"Restore them, take another seed, or add patients and call `pfedsam split {folder}`."
    return [wrong(Path(folder), what, remedy)] if empty else []


@dataclass(frozen=True)
class _Listing:
    """What the entries of sections are looked up in: the content of `datalist.json`, cases and labels by name."""

    folder: Path
    content: Mapping[str, Any]
    known: Mapping[str, Case]
    labels: Mapping[str, Path]

    def read(self, part: Mapping[str, Any], told: str) -> tuple[Split, list[PFedSAMError]]:
        """The sections of a part, and what is wrong in them; `told` names the part."""
        absent = set(self.content.get("absent", []))
        sections: Split = {section: [] for section in SECTIONS}
        problems: list[PFedSAMError] = []
        for section in SECTIONS:
            entries = part.get(section, [] if section == "test" else None)
            if not isinstance(entries, list) or (not entries and section != "test"):
                problems.append(wrong(self.folder, f"section '{section}'{told} is missing or empty"))
                continue
            for entry in entries:
                if entry_name(entry) in absent:
                    continue
                try:
                    sections[section].append(self._case(section, entry))
                except PFedSAMError as error:
                    problems.append(error)
        return sections, [*problems, *_overlaps(self.folder, sections)]

    def _case(self, section: str, entry: Any) -> Case:
        """The case of one entry of a section, a name or a dictionary."""
        folder, patients = self.folder, self.content.get("patients", {})
        if isinstance(entry, str):
            if entry not in self.known:
                what = f"section '{section}' names the unknown case '{entry}'"
                raise wrong(folder, what, f"Restore it, or let `pfedsam split {folder}` keep it out.")
            return self.known[entry]
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            what = f"section '{section}' holds {entry!r}, neither a case name nor a dictionary with 'image'"
            raise wrong(folder, what)
        image = _inside(folder, section, entry["image"])
        name = case_name(image)
        if name is None:
            raise wrong(folder, f"section '{section}' names '{entry['image']}', no image of a known format")
        listed = entry.get("label")
        label = _inside(folder, section, listed) if isinstance(listed, str) else self.labels.get(name)
        return Case(name, image, label, str(entry.get("patient", patients.get(name, name))))


def _differing(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[PFedSAMError]:
    """Folds that list other cases than the first."""
    names = {
        told: {entry_name(entry) for section in SECTIONS for entry in part.get(section, [])}
        for told, part in parts.items()
        if all(isinstance(part.get(section, []), list) for section in SECTIONS)
    }
    first = next(iter(names.values()), set())
    for told, found in names.items():
        if found != first:
            yield wrong(folder, f"the sections{told} list other cases than the first ({few(sorted(found ^ first))})")


def datalist(folder: str | Path, section: str, seed: int = 0, folds: int = FOLDS) -> list[dict[str, str]]:
    """One section of a site as MONAI data dictionaries.

    Args:
        folder: site folder.
        section: `training`, `validation` or `test`; a `datalist.json` without `test` gives an empty list.
        seed: fold, and draw where there is no datalist.
        folds: number of folds where there is no datalist.

    Returns:
        Dictionaries with the keys `image` and `label` (paths), `case` and `patient`.

    Raises:
        PFedSAMError: as `read_split`, and E28 for an unknown section.
    """
    if section not in SECTIONS:
        raise PFedSAMError(
            ErrorCode.UNKNOWN_NAME, f"there is no section '{section}' of a site.", f"Use one of {list(SECTIONS)}."
        )
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
    patients = {case.name: case.patient for cases in split.values() for case in cases if case.patient != case.name}
    if patients:
        content["patients"] = patients
    write_atomically(path, f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())
    return content


def _has_names(content: Mapping[str, Any]) -> bool:
    entries = [content.get(section) for section in SECTIONS]
    return any(isinstance(entry, str) for items in entries if isinstance(items, list) for entry in items)


def _inside(folder: Path, section: str, relative: str) -> Path:
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise wrong(folder, f"section '{section}' names '{relative}', which is not a path inside the site folder")
    try:
        found = (folder / path).exists()
    except (OSError, ValueError):  # too long for a name, or with a character that none has
        found = False
    if not found:
        raise wrong(folder, f"section '{section}' names the missing file {shown(relative)}")
    return folder / path


def _overlaps(folder: Path, sections: Split) -> Iterator[PFedSAMError]:
    """Cases that are listed twice and patients in two sections."""
    section_of_case: dict[str, str] = {}
    sections_of: dict[str, list[str]] = {}
    for section, cases in sections.items():
        for case in cases:
            if case.name in section_of_case:
                yield wrong(
                    folder, f"case '{case.name}' is listed twice ('{section_of_case[case.name]}' and '{section}')"
                )
            section_of_case[case.name] = section
            found = sections_of.setdefault(case.patient, [])
            if section not in found:
                found.append(section)
    for patient, found in sections_of.items():
        if len(found) > 1:
            yield wrong(folder, f"patient '{patient}' is in the sections {found}")


def files_by_name(folder: Path, kind: str) -> dict[str, Path]:
    """Files and DICOM folders of a folder by case name.

    Raises:
        PFedSAMError: E09 if two have one name.
    """
    found: dict[str, Path] = {}
    for path in visible(folder):
        name = case_name(path)
        if name is not None and found.setdefault(name, path) != path:
            raise PFedSAMError(
                ErrorCode.SITE_DATA,
                f"case '{name}' has two {kind}, '{found[name]}' and '{path.name}'.",
                "Keep one of them or rename it.",
            )
    return found


def _require_label(folder: Path, case: Case) -> None:
    if case.label is None:
        raise no_label(folder, case)


def no_label(folder: Path, case: Case) -> PFedSAMError:
    """The error of a case without a label."""
    looked = ", ".join(f"{case.name}{end}" for end in SUFFIXES)
    return PFedSAMError(
        ErrorCode.MISSING_LABEL,
        f"case '{case.name}' has no label: looked for {looked} in '{folder / 'labels'}'.",
        "Add the label or take the image away.",
    )
