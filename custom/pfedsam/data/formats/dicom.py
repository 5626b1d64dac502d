"""DICOM through pydicom: a series, one slice, or frames of a multi-frame object, as one volume in space; an X-ray or an
ultrasound picture, which has no place, as a picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

from pfedsam.data.formats.dicom_file import WHOLE, count_of, in_unit, named, open_data_set, pixels_of, wrong
from pfedsam.data.formats.dicom_frames import Frame, frames_of
from pfedsam.data.formats.dicom_picture import is_picture, read_picture
from pfedsam.data.formats.dicom_space import affine_of
from pfedsam.data.picture import Picture
from pfedsam.data.suffixes import visible
from pfedsam.errors import ErrorCode, PFedSAMError

__all__ = ["Frame", "named", "read", "slices_of", "without_place"]

_OpenFiles = dict[Path, pydicom.Dataset]


def read(path: Path, label: bool = False) -> Picture:
    """Read a folder of one series, or one file of one or many frames.

    Args:
        path: folder or file.
        label: whether it is a label: then it may be a segmentation object.

    Returns:
        Values `(x, y, z)` in the unit of the modality (rescaled, or through its look-up table), slices by position; of
        a single X-ray or ultrasound picture `(x, y)`, see `pfedsam.data.formats.dicom_picture`.

    Raises:
        PFedSAMError: E02 for an empty folder; E05 naming the file, frame and tag for what is no volume of one channel:
            other objects, colour, mosaics, localisers, a missing tag, slices that are missing, double or lie elsewhere,
            several pictures.
    """
    opened = _opened(path, pixels=True)
    file, data = next(iter(opened.items()))
    if is_picture(data):
        _check_alone(path, opened)
        return read_picture(path, file, data, label)
    frames = _in_order(path, opened)
    if not label and any(frame.data.get("Modality") == "SEG" for frame in frames):
        raise wrong(f"{path} is a segmentation object, no image", "Give the series that it belongs to.")
    affine, notes = affine_of(path, frames)
    many = {
        frame.file: pixels_of(frame.file, frame.data)
        for frame in frames
        if count_of(frame.data) > 1 and frame.number == 0
    }
    planes = []
    for frame in frames:
        pixels = many[frame.file][frame.number] if frame.file in many else pixels_of(frame.file, frame.data)
        planes.append(in_unit(frame.file, frame.values, pixels).T)
    return Picture(np.stack(planes, axis=-1), "volume", path, affine, notes=notes)


def slices_of(path: Path) -> list[Frame]:
    """The slices of a volume in its order, without pixels: to refer to them.

    Raises:
        PFedSAMError: as `read`; E05 for a picture, which is no slice.
    """
    return _in_order(path, _opened(path, pixels=False))


def without_place(path: Path) -> bool:
    """Whether DICOM is a picture that lies nowhere, so that no segmentation object can refer to slices of it.

    Raises:
        PFedSAMError: as `read`.
    """
    return any(is_picture(data) for data in _opened(path, pixels=False).values())


def _opened(path: Path, pixels: bool) -> _OpenFiles:
    """The data set of each file, at least one."""
    files = list(visible(path)) if path.is_dir() else [path]
    if not files:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"{path} holds no file.", WHOLE)
    return {file: open_data_set(file, pixels) for file in files}


def _check_alone(path: Path, opened: _OpenFiles) -> None:
    """Refuse a folder of several pictures: nothing says that they are one."""
    if len(opened) > 1:
        raise wrong(
            f"{path} holds {len(opened)} files, the first of them a picture without a place (Modality "
            f"{next(iter(opened.values())).Modality}), no series of slices",
            "Each picture is a case of its own: put the files themselves into the folder images, or give them one by "
            "one.",
        )


def _in_order(path: Path, opened: _OpenFiles) -> list[Frame]:
    """The frames of a volume, by their position along the normal of the first."""
    frames = [frame for file, data in opened.items() for frame in frames_of(file, data)]
    first = frames[0]
    for keyword in ("SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        for frame in frames:
            if frame.data.get(keyword) != first.data.get(keyword):
                raise wrong(f"{path}: slices differ in {keyword} ({first.name} and {frame.name})")
    normal = np.cross(first.row, first.column)
    return sorted(frames, key=lambda frame: float(normal @ frame.position))
