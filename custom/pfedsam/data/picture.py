"""An image or label file that was read: values, geometry, and what a person should know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["volume", "picture"]


@dataclass(frozen=True)
class Picture:
    """One file that was read.

    Attributes:
        values: numbers as the file means them (scaled, in the unit of the modality): `(x, y, z)` of a volume,
            `(x, y)` of a grey picture, `(x, y, 3)` of a colour picture (8 bits). All are finite.
        kind: `volume` (NIfTI, DICOM slices, TIFF of several pages) or `picture`.
        source: the file, or the folder of a DICOM series.
        affine: voxel indices to millimetres, right, anterior, superior; None where the file says nothing of space.
        stored_shape: of the values in the file, where it differs: a label is written in it.
        white: the value of white in a picture, None if its format has none (32-bit integers, floating point).
        pixel_size: of a picture that lies nowhere in space: millimetres along x and y, None if they are not known.
        notes: what a person should know of how it was read, in sentences.
    """

    values: NDArray[Any]
    kind: Kind
    source: Path
    affine: NDArray[np.float64] | None = None
    stored_shape: tuple[int, ...] = ()
    white: float | None = None
    pixel_size: tuple[float, float] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def channels(self) -> int:
        """1, or 3 for colour."""
        return self.values.shape[-1] if self.is_colour else 1

    @property
    def is_colour(self) -> bool:
        """Whether it is a colour picture."""
        return self.kind == "picture" and self.values.ndim == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels or pixels along each axis, without channels."""
        return self.values.shape[:2] if self.kind == "picture" else self.values.shape

    @property
    def volume_shape(self) -> tuple[int, ...]:
        """Shape as a volume: a picture is one slice."""
        return self.shape + (1,) * (3 - len(self.shape))

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of a label that lies on it in its own format."""
        return self.stored_shape or self.shape

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres between neighbours along each axis; None where the file does not say."""
        if self.affine is None:
            return self.pixel_size
        return tuple(float(n) for n in np.linalg.norm(self.affine[:3, :3], axis=0))

    def grey(self) -> NDArray[Any]:
        """Values of one channel; colours by their luma (ITU-R BT.601), as Pillow has it."""
        if not self.is_colour:
            return self.values
        from PIL import Image

        return np.asarray(Image.fromarray(np.ascontiguousarray(self.values)).convert("L"))

    def plane(self, z: int) -> NDArray[Any]:
        """What to show: a slice `(x, y)` of a volume, or the picture `(x, y[, 3])` as it is."""
        return self.values if self.kind == "picture" else self.values[..., z]

    def rows(self, plane: NDArray[Any]) -> NDArray[Any]:
        """A plane `(x, y[, 3])` in its grid as rows from top to bottom: y of a picture points down, of a volume up."""
        return np.swapaxes(plane, 0, 1) if self.kind == "picture" else np.rot90(plane)

    @property
    def orientation(self) -> str:
        """Where each axis points, as "RAS"; "" where the file says nothing of space."""
        if self.affine is None:
            return ""
        from nibabel.orientations import aff2axcodes

        return "".join(str(code) for code in aff2axcodes(self.affine))
