"""NIfTI-1 and NIfTI-2 through nibabel."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from pfedsam.data.limits import check_claim
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: Millimetres of the units that a header may state; nibabel's affine is in the unit that the header states.
_UNITS = {"meter": 1000.0, "micron": 0.001}
_REMEDY = "Export the image again."


def read(path: Path) -> Picture:
    """Read a volume of one channel.

    Returns:
        Values `(x, y, z)`, with the header's scale; `stored_shape` is the file's.

    Raises:
        PFedSAMError: E05 for colour or complex voxels, several channels or time points, an affine that is none, or a
            file that claims too much (`pfedsam.data.limits`).
        Exception: what nibabel raises for a file that it cannot read.
    """
    header = nibabel.load(path)
    if not isinstance(header, (nibabel.Nifti1Image, nibabel.Nifti2Image)):
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"{path} is {type(header).__name__}, expected NIfTI.", _REMEDY)
    shape = tuple(int(size) for size in header.shape)
    dtype = header.get_data_dtype()
    _check_form(path, shape, dtype)
    check_claim(path, int(np.prod(shape, dtype=object)) * dtype.itemsize)
    unit = _unit(path, header)
    factor = _UNITS.get(unit, 1.0)
    affine = np.diag([factor, factor, factor, 1.0]) @ np.asarray(header.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE, f"{path} has an affine that maps no volume: {affine.tolist()}.", _REMEDY
        )
    size = shape[:3] + (1,) * (3 - len(shape[:3]))
    notes = (f"its unit is {unit}: read as millimetres",) if factor != 1 else ()
    values = _values(path, header).reshape(size)
    return Picture(values, "volume", path, affine, shape if shape != size else (), notes=notes)


def _unit(path: Path, header: Any) -> str:
    try:
        return str(header.header.get_xyzt_units()[0])
    except KeyError as error:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE, f"{path} states a unit of length that does not exist ({error}).", _REMEDY
        ) from None


def _values(path: Path, header: Any) -> Any:
    if not path.name.lower().endswith(".gz"):
        return np.asanyarray(header.dataobj)
    # nibabel stops after the last voxel, before the checksum: gzip looks at it when it reads to the end
    with gzip.open(path) as file:
        values = np.asanyarray(type(header).from_stream(file).dataobj)
        while file.read(1 << 20):
            pass
    return values


def _check_form(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.fields is not None:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE, f"{path} holds colour voxels, expected one channel.", "Export it in grey."
        )
    if dtype.kind not in "buif":
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} holds {dtype} voxels, expected real numbers.",
            "Export the magnitude as one channel.",
        )
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"{path} has shape {list(shape)}, expected a volume.", _REMEDY)
    if any(size != 1 for size in shape[3:]):
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has shape {list(shape)}: {int(np.prod(shape[3:]))} channels or time points, expected one channel.",
            "Give one volume of the series.",
        )
