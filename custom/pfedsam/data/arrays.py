"""An array in memory as an image that was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.formats.flat import WHITE_16
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: What an image without a file is called.
_ARRAY = "<array>"
_LAYOUT = "Give (x, y, z) for a volume, (x, y) for a grey and (x, y, 3) of type uint8 for a colour picture."


def picture_of(values: NDArray[Any], affine: NDArray[Any] | None = None) -> Picture:
    """An array as an image that was read; see `pfedsam.Model.segment` for what it may be.

    Raises:
        PFedSAMError: E05 for another shape, type or affine, E09 for values that are not finite.
    """
    name, shape = Path(_ARRAY), list(values.shape)
    flat = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8)
    if values.size == 0 or values.dtype.kind not in "buif" or values.ndim not in (2, 3):
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"the array is {values.dtype}{shape}.", _LAYOUT)
    if not np.isfinite(values).all():
        told = "the array holds values that are not finite (NaN or infinity)."
        raise PFedSAMError(ErrorCode.SITE_DATA, told, "Replace these values.")
    if affine is None and flat:
        white = {"uint8": 255.0, "uint16": float(WHITE_16)}.get(values.dtype.name)
        return Picture(values, "picture", name, white=white)
    if affine is None:
        if values.shape[2] == 3:
            told = f"the array is {values.dtype}{shape}: three slices, or colours that are not of type uint8."
            raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, told, "Give a volume its affine, colours the type uint8.")
        return Picture(values, "volume", name, notes=("it has no affine: its voxels are taken as cubes of 1 mm",))
    place = np.asarray(affine, dtype=np.float64)
    if place.shape != (4, 4) or not np.isfinite(place).all() or abs(np.linalg.det(place)) < 1e-12:
        told = f"the affine maps no volume: {place.tolist()}."
        raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, told, "Give (4, 4): voxel indices to millimetres.")
    stored = tuple(values.shape) if values.ndim == 2 else ()
    return Picture(values.reshape(*values.shape, *(1,) * (3 - values.ndim)), "volume", name, place, stored)
