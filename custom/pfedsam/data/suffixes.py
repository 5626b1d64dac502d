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


def suffix_of(path: Path) -> str | None:
    """The suffix of a known format at the end of a file's name, in lower case, or None."""
    return next((end for end in SUFFIXES if path.name.lower().endswith(end) and len(path.name) > len(end)), None)


def case_name(path: Path) -> str | None:
    """The case that a file, or a folder of DICOM slices, belongs to: its name without suffix; None if it is none."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return path.name if any(item.is_file() for item in visible(path)) else None
    end = suffix_of(path)
    return path.name[: -len(end)] if end else None


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
