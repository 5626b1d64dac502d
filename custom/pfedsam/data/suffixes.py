"""The file formats of images and labels: one list for both, in which capitals do not matter. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

NIFTI: tuple[str, ...] = (".nii.gz", ".nii")
FLAT: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM: tuple[str, ...] = (".dcm",)
SUFFIXES: tuple[str, ...] = (*NIFTI, *FLAT, *DICOM)

#: Bytes before the mark of a DICOM file, and the mark.
_PREAMBLE, _DICOM_MARK = 128, b"DICM"
#: The table of contents of a DICOM medium: it has the mark, and is no image.
_CONTENTS = "DICOMDIR"


def suffix_of(path: Path) -> str | None:
    """The suffix of a known format at the end of a file's name, in lower case, or None."""
    return next((end for end in SUFFIXES if path.name.lower().endswith(end) and len(path.name) > len(end)), None)


def case_name(path: Path) -> str | None:
    """The case that a file, or a folder of DICOM slices, belongs to: its name without suffix; None if it is none.

    A DICOM file as archives export it, `IM000001` or a UID, has no suffix: its whole name is the case's.
    """
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return path.name if any(item.is_file() for item in visible(path)) else None
    end = suffix_of(path)
    if end:
        return path.name[: -len(end)]
    return path.name if _without_suffix(path.name) and path.is_file() and is_dicom(path) else None


def _without_suffix(name: str) -> bool:
    """Whether a name ends without a suffix, or as a UID does in a number."""
    _, dot, end = name.rpartition(".")
    return (not dot or end.isdigit()) and name.upper() != _CONTENTS


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, by its suffix or, as files of a scanner often have none, by its mark."""
    if path.name.lower().endswith(DICOM):
        return True
    with path.open("rb") as file:
        return file.read(_PREAMBLE + len(_DICOM_MARK))[_PREAMBLE:] == _DICOM_MARK


def visible(folder: Path) -> Iterator[Path]:
    """What a folder holds, in order, without hidden files; nothing if it is no folder."""
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
