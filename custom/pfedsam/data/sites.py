"""A site folder, the one input format, and how its cases are split by patient.

    <site>/images/<case>.nii.gz | .nii | .png | .jpg | .jpeg | .tif | .tiff | .bmp | .dcm   or a folder of DICOM slices
    <site>/labels/<case>                                               the same case name and formats, integer labels
    <site>/datalist.json                                               optional

`datalist.json` holds the sections `training`, `validation` and, optionally, `test`: lists of case names or of
`{"image": ..., "label": ..., "patient": ...}` with paths relative to the site. Its optional key `patients` maps case
names to patients; with this key alone the cases are still split by seed. A patient is never in two sections.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pfedsam.data.labels import few
from pfedsam.data.suffixes import NIFTI, SUFFIXES, case_name, visible
from pfedsam.errors import PFedSAMError
from pfedsam.files import write_atomically
from pfedsam.settings import shown

SECTIONS: tuple[str, ...] = ("training", "validation", "test")
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
        raise PFedSAMError("E02", f"site folder '{folder}': there is no folder '{missing}'.", LAYOUT)
    patients = _content(folder).get("patients", {})
    labels = files_by_name(folder / "labels", "labels")
    cases = {
        name: Case(name, path, labels.get(name), str(patients.get(name, name)))
        for name, path in files_by_name(images, "images").items()
    }
    if not cases:
        raise PFedSAMError("E02", f"site folder '{folder}': there is no image in '{images}'.", LAYOUT)
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
            "E09",
            f"{few(str(path) for path in left_out)}: no image of a known format.",
            f"Take it out of the folder, or convert it to one of {', '.join(SUFFIXES)}.",
        )
    return [{"image": str(case.image)} for case in cases]


def result_name(metadata: Mapping[str, Any], saver: Any) -> dict[str, Any]:
    """How MONAI's `SaveImage` names a result: by the case, whatever capitals or dots the name of its image has."""
    path = Path(str(metadata["filename_or_obj"]))
    return {"subject": f"{case_name(path) or path.name}{NIFTI[0]}", "idx": metadata.get("patch_index")}


def split_site(cases: Sequence[Case], seed: int, folds: int = 3, validation_fraction: float = 0.2) -> Split:
    """Split cases by patient into training, validation and test.

    One fixed permutation of the patients, which follows from their names alone, is dealt out to `folds` folds; fold
    `seed % folds` is the test section. So the seeds 0 to folds - 1 test every patient exactly once. `seed` also
    chooses the validation patients among the others.

    Args:
        cases: the cases of one site.
        seed: fold and draw.
        folds: number of folds, at least 2.
        validation_fraction: share of the patients outside the test fold, rounded, at least one patient.

    Raises:
        PFedSAMError: E06 if there are fewer than 3 patients or fewer than folds; E16 if a setting makes no sense.
    """
    if folds < 2 or not 0 <= validation_fraction < 1:
        raise PFedSAMError(
            "E16",
            f"cannot split into {folds} folds with a validation fraction of {validation_fraction}.",
            "Use at least 2 folds and a fraction from 0 to below 1.",
        )
    patients = sorted({case.patient for case in cases}, key=_hash)
    if len(patients) < max(3, folds):
        where = f" in '{cases[0].image.parent}'" if cases else ""
        raise PFedSAMError(
            "E06",
            f"{len(patients)} patient(s){where}, a split into {folds} folds needs at least {max(3, folds)}.",
            "Add cases, or write a datalist.json with the sections training and validation.",
        )
    tested = set(patients[seed % folds :: folds])
    others = sorted((patient for patient in patients if patient not in tested), key=lambda p: _hash(f"{seed}|{p}"))
    # at least one patient is left to train on
    held_out = set(others[: min(max(1, round(validation_fraction * len(others))), max(1, len(others) - 1))])
    split: Split = {section: [] for section in SECTIONS}
    for case in sorted(cases, key=lambda case: case.name):
        section = "test" if case.patient in tested else "validation" if case.patient in held_out else "training"
        split[section].append(case)
    if not split["training"]:
        raise PFedSAMError(
            "E06", f"no patient of {len(patients)} is left to train on with {folds} folds.", "Use more folds or cases."
        )
    return split


def read_split(folder: str | Path, seed: int = 0, folds: int = 3) -> Split:
    """The split of a site: by its `datalist.json` if that has sections, else by `split_site`.

    Raises:
        PFedSAMError: as `read_site` and `split_site`, and E08 for the first thing wrong in `datalist.json`.
    """
    folder = Path(folder)
    split = listed_split(folder)
    if split is None:
        return split_site(read_site(folder), seed, folds)
    sections, problems = split
    if problems:
        raise problems[0]
    for case in (case for cases in sections.values() for case in cases):
        _require_label(folder, case)
    return sections


def listed_split(folder: str | Path) -> tuple[Split, list[PFedSAMError]] | None:
    """The sections of `datalist.json` with everything that is wrong in them, or None if there are no sections.

    Raises:
        PFedSAMError: E08 if the file is not readable; E02 or E09 as `read_site`.
    """
    folder = Path(folder)
    content = _content(folder)
    if not any(section in content for section in SECTIONS):
        return None
    known = {case.name: case for case in read_site(folder, require_labels=False)} if _has_names(content) else {}
    patients, labels = content.get("patients", {}), files_by_name(folder / "labels", "labels")
    sections: Split = {section: [] for section in SECTIONS}
    problems: list[PFedSAMError] = []
    for section in SECTIONS:
        entries = content.get(section, [] if section == "test" else None)
        if not isinstance(entries, list) or (not entries and section != "test"):
            problems.append(_wrong(folder, f"section '{section}' is missing or empty"))
            continue
        for entry in entries:
            try:
                sections[section].append(_listed_case(folder, section, entry, known, labels, patients))
            except PFedSAMError as error:
                problems.append(error)
    return sections, [*problems, *_overlaps(folder, sections)]


def datalist(folder: str | Path, section: str, seed: int = 0, folds: int = 3) -> list[dict[str, str]]:
    """One section of a site as MONAI data dictionaries.

    Args:
        folder: site folder.
        section: `training`, `validation` or `test`; a `datalist.json` without `test` gives an empty list.
        seed: fold and draw where there is no datalist.
        folds: number of folds where there is no datalist.

    Returns:
        Dictionaries with the keys `image` and `label` (paths), `case` and `patient`.

    Raises:
        PFedSAMError: as `read_split`, and E16 for an unknown section.
    """
    if section not in SECTIONS:
        raise PFedSAMError("E16", f"there is no section '{section}' of a site.", f"Use one of {list(SECTIONS)}.")
    return [
        {"image": str(case.image), "label": str(case.label), "case": case.name, "patient": case.patient}
        for case in read_split(folder, seed, folds)[section]
    ]


def write_split(folder: str | Path, path: str | Path, seed: int = 0, folds: int = 3) -> dict[str, Any]:
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


def _content(folder: Path) -> dict[str, Any]:
    """What `datalist.json` holds, {} if there is none."""
    path = folder / "datalist.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(folder, f"it is not readable JSON ({str(error).splitlines()[0]})") from None
    keys = (*SECTIONS, "patients")
    if not isinstance(content, dict) or not any(key in content for key in keys):
        raise _wrong(folder, f"it has none of the keys {list(keys)}")
    if not isinstance(content.get("patients", {}), dict):
        raise _wrong(folder, "'patients' does not map case names to patients")
    return content


def _has_names(content: dict[str, Any]) -> bool:
    entries = [content.get(section) for section in SECTIONS]
    return any(isinstance(entry, str) for items in entries if isinstance(items, list) for entry in items)


def _listed_case(
    folder: Path, section: str, entry: Any, known: dict[str, Case], labels: dict[str, Path], patients: dict[str, Any]
) -> Case:
    """The case of one entry of a section, a name or a dictionary."""
    if isinstance(entry, str):
        if entry not in known:
            raise _wrong(folder, f"section '{section}' names the unknown case '{entry}'")
        return known[entry]
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise _wrong(folder, f"section '{section}' holds {entry!r}, neither a case name nor a dictionary with 'image'")
    image = _inside(folder, section, entry["image"])
    name = case_name(image)
    if name is None:
        raise _wrong(folder, f"section '{section}' names '{entry['image']}', no image of a known format")
    listed = entry.get("label")
    label = _inside(folder, section, listed) if isinstance(listed, str) else labels.get(name)
    return replace(Case(name, image, label, name), patient=str(entry.get("patient", patients.get(name, name))))


def _inside(folder: Path, section: str, relative: str) -> Path:
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise _wrong(folder, f"section '{section}' names '{relative}', which is not a path inside the site folder")
    try:
        found = (folder / path).exists()
    except (OSError, ValueError):  # too long for a name, or with a character that none has
        found = False
    if not found:
        raise _wrong(folder, f"section '{section}' names the missing file {shown(relative)}")
    return folder / path


def _overlaps(folder: Path, sections: Split) -> Iterator[PFedSAMError]:
    """Cases that are listed twice and patients in two sections."""
    section_of_case: dict[str, str] = {}
    sections_of: dict[str, list[str]] = {}
    for section, cases in sections.items():
        for case in cases:
            if case.name in section_of_case:
                yield _wrong(
                    folder, f"case '{case.name}' is listed twice ('{section_of_case[case.name]}' and '{section}')"
                )
            section_of_case[case.name] = section
            found = sections_of.setdefault(case.patient, [])
            if section not in found:
                found.append(section)
    for patient, found in sections_of.items():
        if len(found) > 1:
            yield _wrong(folder, f"patient '{patient}' is in the sections {found}")


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
                "E09",
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
        "E03",
        f"case '{case.name}' has no label: looked for {looked} in '{folder / 'labels'}'.",
        "Add the label or take the image away.",
    )


def _wrong(folder: Path, what: str) -> PFedSAMError:
    return PFedSAMError(
        "E08", f"'{folder / 'datalist.json'}': {what}.", "Correct the file, or remove it to split by seed."
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
