"""A single X-ray or ultrasound picture in DICOM: grey, with the size of its pixels where the file has it, and no place.

A projection lies nowhere among the patient's slices, so such files have neither position nor orientation (PS3.3, A.2,
A.14, A.26).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from pfedsam.data.formats.dicom_file import count_of, first_of, in_unit, pixels_of, several
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: Modalities (PS3.3, C.7.3.1.1.1) of pictures: X-ray in all its forms, and ultrasound.
MODALITIES = ("CR", "DX", "IO", "MG", "PX", "RF", "RG", "US", "XA")
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient")
#: Millimetres of a pixel, down and across: in the patient where that was calibrated, else at the detector or the film.
_SIZE, _SIZES_OUTSIDE = "PixelSpacing", ("ImagerPixelSpacing", "NominalScannedPixelSpacing")
_WHITE_FIRST = "MONOCHROME1"
_PADDING, _PADDING_LIMIT = "PixelPaddingValue", "PixelPaddingRangeLimit"


def is_picture(data: pydicom.Dataset) -> bool:
    """Whether a data set is one picture of an X-ray kind, which says nothing of where it lies."""
    frame = first_of(data, "PerFrameFunctionalGroupsSequence")
    placed = frame is not None and first_of(frame, "PlanePositionSequence") is not None
    return (
        str(data.get("Modality") or "").upper() in MODALITIES
        and count_of(data) == 1
        and not placed
        and all(data.get(keyword) in (None, "") for keyword in _PLACE)
    )


def read_picture(path: Path, file: Path, data: pydicom.Dataset, label: bool = False) -> Picture:
    """The picture of a data set.

    Args:
        path: what was given: the file, or the folder that holds it.
        file: of the data set.
        data: with pixels; it loses them.
        label: whether it is a label: its values stay as they are.

    Returns:
        Values `(x, y)` after rescaling, counted from black, whichever end of the stored values is black; padding is
        black. `white` is the largest value that the file can hold; None of floating point.

    Raises:
        PFedSAMError: E05 for pixels that cannot be read; E07 for a label that says that 0 is white.
    """
    white_first = str(data.PhotometricInterpretation) == _WHITE_FIRST
    if label and white_first:
        message = f"label '{path}' says that 0 is white: whether white or black is the foreground is not known."
        remedy = "Store the label as plain numbers (MONOCHROME2)."
        raise PFedSAMError(ErrorCode.LABEL_OUT_OF_RANGE, message, remedy)
    stored = pixels_of(file, data)
    values = in_unit(file, data, stored)
    white = None
    if not label and stored.dtype.kind in "bui":
        low, high = _ends(file, data, stored.dtype)
        values, white = _from_black(values, low, high, white_first), high - low
        values[_padding(data, stored)] = 0
    elif white_first:
        values = values.max() - values
    size, notes = _pixel_size(data)
    return Picture(values.T, "picture", path, white=white, pixel_size=size, notes=notes)


def _ends(file: Path, data: pydicom.Dataset, kind: np.dtype[Any]) -> tuple[float, float]:
    """The smallest and the largest value that the file can hold, after rescaling."""
    table = first_of(data, "ModalityLUTSequence")
    if table is not None:
        return 0.0, float(2 ** int(table.LUTDescriptor[2]) - 1)
    bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = sorted(float(end) for end in in_unit(file, data, np.asarray(ends, dtype=kind)))
    return low, high


def _from_black(values: NDArray[Any], low: float, high: float, white_first: bool) -> NDArray[Any]:
    """Values counted from black; whole numbers in the smallest type that holds them."""
    whole = values.dtype.kind in "bui"
    wide = values.astype(np.int64 if whole else np.float32)
    # bits above those that are stored held overlays once
    wide = np.clip(wide, low, high)
    counted = high - wide if white_first else wide - low
    return counted.astype(np.min_scalar_type(int(high - low)) if whole else np.float32)


def _padding(data: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels outside of what was exposed, by their stored value (PS3.3, C.7.5.1.1.2)."""
    value, limit = data.get(_PADDING), data.get(_PADDING_LIMIT)
    if not isinstance(value, int):
        return np.zeros(stored.shape, dtype=bool)
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (stored >= low) & (stored <= high)


def _pixel_size(data: pydicom.Dataset) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """Millimetres of a pixel along x and y, and what to know of them."""
    for keyword in (_SIZE, *_SIZES_OUTSIDE):
        if data.get(keyword) in (None, ""):
            continue
        try:
            down, across = (float(one) for one in several(data.get(keyword)))
        except (TypeError, ValueError):
            down = across = 0.0
        if not (0 < down < np.inf and 0 < across < np.inf):
            return None, (f"its {keyword} is no size of a pixel: distances are in pixels",)
        outside = keyword != _SIZE
        told = f"its pixel size is that at the detector or film ({keyword}): in the patient distances are smaller"
        return (across, down), (told,) * outside
    return None, ()
