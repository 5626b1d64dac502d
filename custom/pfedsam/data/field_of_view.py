"""What of an image a bundle with a field of view cannot see: it is cut to a square of so many millimetres."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.picture import Picture


def _within(picture: Picture, side: float) -> dict[int, tuple[int, int]]:
    """First index inside, and first behind it, along the axes that the bundles cut: right-left and front-back."""
    axes: tuple[int, ...] = (0, 1)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    if picture.affine is not None and picture.spacing is not None:
        from nibabel.orientations import io_orientation

        world = io_orientation(picture.affine)[:, 0]
        axes, spacing = tuple(int(np.flatnonzero(world == n)[0]) for n in (0, 1)), picture.spacing
    inside = {}
    for axis in axes:
        size = picture.volume_shape[axis]
        cut = max(0, int(np.floor((size - side / spacing[axis]) / 2)))
        inside[axis] = (cut, size - cut)
    return inside


def share_outside(picture: Picture, side: float) -> float:
    """The share of an image, 0 to 1, that lies outside a field of view of `side` millimetres."""
    inside = _within(picture, side)
    return 1 - float(np.prod([(last - first) / picture.volume_shape[axis] for axis, (first, last) in inside.items()]))


def labelled_outside(positive: NDArray[np.bool_], image: Picture, side: float) -> int:
    """Voxels of a label, `(x, y, z)`, or pixels `(x, y)`, outside the field of view of its image."""
    volume = positive.reshape(image.volume_shape)
    window = [slice(None)] * volume.ndim
    for axis, (first, last) in _within(image, side).items():
        window[axis] = slice(first, last)
    return int(np.count_nonzero(volume)) - int(np.count_nonzero(volume[tuple(window)]))


def told(share: float, side: float) -> str:
    """A sentence about the share that is outside, and what to set."""
    return (
        f"{share:.0%} of the image lies outside the bundle's field of view of {side:g} mm, where nothing is seen; a "
        "larger one is set in training with --set field_of_view_mm=..., with pixels as much coarser"
    )
