"""The reader as a dictionary transform, for bundles: MONAI's loaders read a format by rules of their own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys, ensure_tuple
from numpy.typing import NDArray

from pfedsam.data.geometry import turned_onto
from pfedsam.data.labels import UNKNOWN
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: White of a colour picture that is given to a network.
WHITE = 255.0
#: Types whose axes torch turns faster than NumPy.
_TURNED = (np.uint8, np.int8, np.int16, np.int32, np.float32)


class ReadImaged(MapTransform):
    """Files, or pictures that were read already, as channel-first tensors with an affine: images as single precision,
    labels as integers in the smallest type that holds them.

    Without `colour` all are volumes: `(1, x, y, z)`. A picture is a volume of one slice with pixels of 1 mm, a colour
    picture is read as grey. With `colour` all are pictures: images `(3, x, y)` from 0 to 255, labels `(1, x, y)`.

    An image and its label lie on each other, voxel by voxel: a file that says nothing of space lies where the other
    does, and a label that is stored in another order of the axes is turned as its image. An item without a label gets
    one that is unknown everywhere.

    Args:
        keys: of the items to read: paths, or `pfedsam.data.reader.Picture`.
        labels: those of them that are labels.
        colour: whether the bundle takes colour pictures.
    """

    def __init__(self, keys: KeysCollection, labels: KeysCollection = (), colour: bool = False) -> None:
        super().__init__(keys)
        self.labels, self.colour = set(ensure_tuple(labels)), colour

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read every key.

        Raises:
            PFedSAMError: as `load_picture`; E04 if an image and its label differ in shape; E05 for a volume where
                pictures are expected, or numbers that single precision does not hold.
        """
        items = dict(data)
        images = set(self.keys) - self.labels
        missing = [key for key in self.keys if images and key in self.labels and key not in items]
        items |= dict.fromkeys(missing)
        read = {
            key: self._picture(items[key], key in self.labels) for key in self.key_iterator(items) if key not in missing
        }
        image = next((one for key, one in read.items() if key not in self.labels), None)
        if image is not None:
            read |= {key: turned_onto(image, one) for key, one in read.items() if key in self.labels}
            read |= {key: _unknown(image) for key in missing}
        _check_shapes(list(read.values()))
        nowhere = _of_pixels(read.values()) if self.colour else np.eye(4)
        affine = next((one.affine for one in read.values() if one.affine is not None), nowhere)
        for key, picture in read.items():
            values = self._channels(picture, key in self.labels)
            items[key] = _tensor(values, picture, affine if picture.affine is None else picture.affine)
        return items

    def _picture(self, item: Any, label: bool) -> Picture:
        picture = item if isinstance(item, Picture) else load_picture(Path(item), label)
        if self.colour and label and picture.kind == "volume" and picture.shape[2] == 1:
            # the mask of a photograph may be stored as a volume of one slice
            picture = replace(picture, values=picture.values[..., 0], kind="picture", affine=None)
        if self.colour and picture.kind != "picture":
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"{picture.source} is a volume, and the bundle takes pictures.",
                "Use a bundle for volumes, as brain_lesion_mri, or give PNG, JPG or TIFF pictures.",
            )
        return picture

    def _channels(self, picture: Picture, label: bool) -> NDArray[Any]:
        """Values with the channel first."""
        if label:
            values = picture.values[None]
        elif self.colour:
            values = _colours(picture)
        else:
            values = picture.grey()[None]
        if picture.kind == "picture" and not self.colour:
            values = values[..., None]
        return in_c_order(values) if label else _single(values, picture.source)


def _unknown(image: Picture) -> Picture:
    """The label of an image that has none."""
    return replace(image, values=np.full(image.shape, UNKNOWN, dtype=np.int16))


def _colours(picture: Picture) -> NDArray[Any]:
    """Three channels from 0 to 255."""
    if picture.is_colour:
        return np.moveaxis(picture.values, -1, 0)
    if picture.white is None:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{picture.source} holds {picture.values.dtype} numbers: nothing says which of them is white.",
            "Save it as a picture of 8 or 16 bits.",
        )
    values = picture.values if picture.white == WHITE else picture.values.astype(np.float32) * (WHITE / picture.white)
    return np.stack([values] * 3)


def _single(values: NDArray[Any], source: Path) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        found = in_c_order(values).astype(np.float32, copy=False)
    if values.dtype.itemsize > 4 and values.dtype.kind == "f" and not np.isfinite(found).all():
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE, f"{source} holds {np.abs(values).max():g}, too large.", "Rescale the image."
        )
    return found


def in_c_order(values: NDArray[Any]) -> NDArray[Any]:
    """An array whose last axis is next to each other in memory; the same one if it is so already.

    NIfTI files have it the other way round. A volume is turned in two steps, each of which moves whole lines of the
    processor's cache: the slices against all others, then the axes of a slice.
    """
    volume = values[0] if values.ndim == 4 and len(values) == 1 else values
    flags, turns = volume.flags, volume.ndim == 3 and volume.dtype in _TURNED
    # torch takes no array that is read-only, as a file that is mapped
    if not turns or flags.c_contiguous or not flags.f_contiguous or not flags.writeable:
        return np.ascontiguousarray(values)
    x, y, z = volume.shape
    slices = torch.from_numpy(volume.reshape(x * y, z, order="F").T)
    turned = slices.t().contiguous().view(y, x, z).transpose(0, 1).contiguous()
    return turned.numpy().reshape(values.shape)


def _of_pixels(pictures: Iterable[Picture]) -> NDArray[np.float64]:
    """The affine of pictures that lie nowhere: the size of their pixels, which distances are measured by."""
    size = next((one.pixel_size for one in pictures if one.pixel_size is not None), (1.0, 1.0))
    return np.diag([*size, 1.0, 1.0])


def _check_shapes(pictures: list[Picture]) -> None:
    first = pictures[0]
    for other in pictures[1:]:
        if other.volume_shape != first.volume_shape:
            raise PFedSAMError(
                ErrorCode.SHAPES_DIFFER,
                f"{first.source} has shape {list(first.shape)}, {other.source} {list(other.shape)}.",
                "Resample the label to the image.",
            )


def _tensor(values: NDArray[Any], picture: Picture, affine: NDArray[np.float64]) -> MetaTensor:
    place = torch.as_tensor(affine, dtype=torch.float64)
    meta = {
        ImageMetaKey.FILENAME_OR_OBJ: str(picture.source),
        MetaKeys.ORIGINAL_AFFINE: affine,
        MetaKeys.SPATIAL_SHAPE: np.asarray(values.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: 0,
    }
    return MetaTensor(torch.from_numpy(values), affine=place, meta=meta)
