"""Whether an image and its label lie on each other, and a label that is stored in another order of the axes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from pfedsam.data.picture import Picture

#: An image and its label lie at the same place if no corner is farther apart than this share of a voxel.
SAME_PLACE = 0.1


def same_place(image: Picture, label: Picture) -> bool:
    """Whether every voxel of a label lies where the voxel of the same indices of its image does.

    Both have an affine and one shape.
    """
    assert image.affine is not None and label.affine is not None and image.spacing is not None
    corners = np.array([[*corner, 1] for corner in product(*[(0, size - 1) for size in image.shape])], dtype=float)
    apart = np.linalg.norm((corners @ (image.affine - label.affine).T)[:, :3], axis=1).max()
    return bool(apart <= SAME_PLACE * min(image.spacing))


def turned_onto(image: Picture, label: Picture) -> Picture:
    """The label with its axes in the order and direction of its image's, where both then lie at the same place.

    A label that was drawn on a NIfTI copy of a DICOM series is often stored the other way round. Any other label is
    returned as it is.
    """
    if image.affine is None or label.affine is None or image.orientation == label.orientation:
        return label
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

    way = ornt_transform(io_orientation(label.affine), io_orientation(image.affine))
    values = apply_orientation(label.values, way)
    turned = replace(label, values=values, affine=label.affine @ inv_ornt_aff(way, label.values.shape), stored_shape=())
    return turned if turned.shape == image.shape and same_place(image, turned) else label
