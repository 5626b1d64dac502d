"""A site folder, the one input format, and the cases in it.

    <site>/images/<case>.nii.gz | .nii | .png | .jpg | .jpeg | .tif | .tiff | .bmp | .dcm   or a folder of DICOM slices
    <site>/labels/<case>                                               the same case name and formats, integer labels;
                                                                       a case without one is unlabelled
    <site>/datalist.json                                               optional

What `datalist.json` holds: `pfedsam.data.datalist_file`. How cases are split: `pfedsam.data.sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfedsam.data.datalist_file import read_content
from pfedsam.data.suffixes import SUFFIXES, case_name, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few

LAYOUT = f"Expected <site>/images/<case> and <site>/labels/<case>, each {'|'.join(SUFFIXES)} or a DICOM folder."

#: The cases of each section.
Split = dict[str, list["Case"]]


@dataclass(frozen=True)
class Case:
    """One image of a site, a volume or a 2-D image, with its label.

    Args:
        name: file name without suffix; the same for image and label.
        image: image file, or folder of DICOM slices.
        label: label file, or None for an unlabelled case.
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


def read_site(folder: str | Path) -> list[Case]:
    """The cases of a site folder, sorted by name, with a label and without.

    Args:
        folder: site folder.

    Raises:
        PFedSAMError: E02 if the folder or its images are missing, E08 for a `datalist.json` that is not readable, E09
            if two images or two labels have one case name.
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
    return sorted(cases.values(), key=lambda case: case.name)


def labelled_cases(folder: Path, cases: Sequence[Case]) -> list[Case]:
    """Those of a site's cases that have a label.

    Raises:
        PFedSAMError: E03 if none has one, or if labels have names of no case: they may be those that are missing.
    """
    found = [case for case in cases if case.label is not None]
    without = next((case for case in cases if case.label is None), None)
    if without is not None:
        strays = stray_labels(folder)
        if strays:
            raise misnamed(folder, without, strays)
        if not found:
            raise no_label(folder, without)
    return found


def stray_labels(folder: Path) -> list[Path]:
    """What is in a site's folder of labels and belongs to no image."""
    names = {case_name(path) for path in visible(folder / "images")} - {None}
    return [path for path in visible(folder / "labels") if case_name(path) not in names]


def misnamed(folder: Path, case: Case, strays: Sequence[Path]) -> PFedSAMError:
    """The error of a case without a label beside labels without a case."""
    error = no_label(folder, case)
    what = f"{error.message[:-1]}, where {few(path.name for path in strays)} belong(s) to no image."
    return PFedSAMError(error.code, what, "Name each label as its image; take away what belongs to none.")


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


def require_label(folder: Path, case: Case) -> None:
    """Refuse a case without a label (E03)."""
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
