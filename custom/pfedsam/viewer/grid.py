"""The grid that the page shows an image in, and the way back into the grid of its file.

The page gets every image turned so that its axes point right, anterior and superior, because NiiVue's voxel numbers
then are those of the arrays that it was given. Axes longer than a texture of common graphics cards are shown at every
second, third, ... voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from pfedsam.data.intensity import WINDOW
from pfedsam.data.picture import Picture

#: Voxels along an axis: least of the limits on 3-D textures that graphics cards have.
MOST = 2048
#: The first axis of a picture points right, the second down.
_PICTURE = np.diag([1.0, -1.0, 1.0, 1.0])
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
#: Types of voxels that the page reads; others become single precision.
_PLAIN = ("uint8", "int16", "uint16", "int32", "float32")


@dataclass(frozen=True)
class Grid:
    """The grid of an image in its file, `shape` with three axes, and how the page shows it.

    Attributes:
        shape: `(x, y, z)`; a picture has one slice.
        affine: `(4, 4)`, voxel indices to millimetres; of pictures to pixels.
        flat: whether it is a picture: its boxes have no z.
        most: see `MOST`.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    flat: bool = False
    most: int = MOST

    @classmethod
    def of(cls, image: Picture, most: int = MOST) -> Grid:
        """The grid of an image."""
        flat = image.kind == "picture"
        affine = _PICTURE if flat else (np.eye(4) if image.affine is None else image.affine)
        return cls(image.volume_shape, affine, flat, most)

    @cached_property
    def _axes(self) -> NDArray[Any]:
        return io_orientation(self.affine)

    @cached_property
    def _whole(self) -> tuple[int, ...]:
        """Shape when turned, before voxels are left out."""
        turned = [0, 0, 0]
        for axis, (to, _) in enumerate(self._axes):
            turned[int(to)] = self.shape[axis]
        return tuple(turned)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Every how many voxels are shown along each axis; both axes of a picture alike."""
        steps = [-(-size // self.most) for size in self._whole]
        return (max(steps[:2]), max(steps[:2]), steps[2]) if self.flat else tuple(steps)

    @property
    def shown_shape(self) -> tuple[int, ...]:
        """Shape as shown."""
        return tuple(-(-size // step) for size, step in zip(self._whole, self.steps, strict=True))

    def shown(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values in the grid of the file, `(x, y, z)` or `(x, y, z, 3)`, as they are shown."""
        return apply_orientation(values, self._axes)[tuple(slice(None, None, step) for step in self.steps)]

    def nifti(self, values: NDArray[Any], window: tuple[float, float] | None = None, labels: bool = False) -> bytes:
        """Values in the grid of the file as NIfTI for the page; three channels are colours.

        Args:
            values: as `shown` takes them.
            window: values of black and white.
            labels: whether they are class numbers: the page outlines areas of a file that says so.
        """
        shown = np.ascontiguousarray(self.shown(values))
        if shown.ndim == 4:
            shown = shown.astype(np.uint8).view(_RGB)[..., 0]
        elif shown.dtype.name not in _PLAIN:
            shown = shown.astype(np.uint8 if shown.dtype == bool else np.float32)
        turned = self.affine @ inv_ornt_aff(self._axes, self.shape) @ np.diag([*self.steps, 1.0])
        image = nibabel.Nifti1Image(shown, turned)
        if window is not None:
            image.header["cal_min"], image.header["cal_max"] = window
        if labels:
            image.header.set_intent("label")
        return bytes(image.to_bytes())

    def box(self, shown: Sequence[int]) -> list[int]:
        """A box `(x0, x1, y0, y1, z0, z1)`, first and last voxel as shown, in the grid of the file; of a picture x, y.

        A box that is larger than the image is cut to it.
        """
        box = []
        for axis, (to, direction) in enumerate(self._axes):
            size, step = self.shape[axis], self.steps[int(to)]
            ends = sorted(shown[2 * int(to) : 2 * int(to) + 2])
            first, last = (min(max(end, 0), size - 1) for end in (ends[0] * step, ends[1] * step + step - 1))
            box += [first, last] if direction > 0 else [size - 1 - last, size - 1 - first]
        return box[:4] if self.flat else box

    def drawn(self, shown: NDArray[np.uint8], start: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A drawing in the grid of the file.

        Args:
            shown: `shown_shape`, what the page holds.
            start: `shape`, what the drawing began with. It is kept wherever the drawing was not changed, so that a grid
                with voxels left out costs nothing there.
        """
        changed = shown != self.shown(start)
        whole = apply_orientation(start, self._axes).copy()
        for axis, step in enumerate(self.steps):
            shown, changed = np.repeat(shown, step, axis), np.repeat(changed, step, axis)
        inside = tuple(slice(size) for size in self._whole)
        np.copyto(whole, shown[inside], where=changed[inside])
        back = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), self._axes)
        return np.ascontiguousarray(apply_orientation(whole, back))


def window_of(image: Picture) -> tuple[float, float]:
    """Black and white of an image on the screen: a picture's own, of a volume the percentiles that the bundles use."""
    if image.kind == "picture" and image.values.dtype == np.uint8:
        return 0.0, 255.0
    low, high = (float(value) for value in np.percentile(image.values, WINDOW))
    if low == high:
        low, high = float(image.values.min()), float(image.values.max())
    return low, high if high > low else low + 1.0
