"""What the page compares: masks as class numbers, how two differ, and their Dice.

The functions import torch and MONAI: an image without a label or model is shown without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pfedsam.bundles import class_names, class_values, find_bundle, is_rgb
from pfedsam.data.labels import OPEN, UNKNOWN, UNKNOWN_NAME, black_and_white, class_numbers, found_values
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.evaluation.difference import difference as areas_of

if TYPE_CHECKING:
    from pfedsam.inference.predict import Prediction

#: Values of a difference, by the name of the area.
AREAS = {"found": 1, "missed": 2, "wrong": 3}
#: The largest value that a saved label holds: a picture's is a PNG of 8 bits.
_LARGEST = 255
#: Classes of a label without a model: more are no segmentation that a person looks at.
MOST_CLASSES = 32


@dataclass(frozen=True)
class Classes:
    """What the values of masks mean.

    Attributes:
        names: of the classes; value n of a mask is the n-th, and the value after the last, if the site's labels have a
            value for it, says that nobody knows what is there.
        values: for each class the numbers that belong to it: of nested classes several.
        colour: whether the bundle takes colour pictures.
        label_map: what the values of the site's label files mean, see `pfedsam.data.transforms.ClassChannelsd`; None
            if they are the class numbers. Masks here hold class numbers all the same.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colour: bool = False
    label_map: Mapping[str, str] | None = None

    @classmethod
    def of_values(cls, top: int, unknown: int | None = None) -> Classes:
        """Of a label without a bundle: each value up to `top` is a class of its own; `unknown` is the site's value."""
        names = {str(number): f"value {number}" for number in range(1, top + 1)}
        label_map = None if unknown is None else names | {str(unknown): UNKNOWN_NAME}
        return cls(tuple(names.values()), tuple((int(number),) for number in names), label_map=label_map)

    @classmethod
    def of_bundle(cls, bundle: str, settings: Mapping[str, Any], label_map: Mapping[str, str] | None = None) -> Classes:
        """The classes of an installed bundle.

        Raises:
            PFedSAMError: E01 for a label map that names another class.
        """
        folder = find_bundle(bundle)
        names = tuple(class_names(folder))
        class_numbers(names, label_map)
        return cls(names, class_values(bundle, settings), is_rgb(folder), label_map)

    @property
    def unknown(self) -> int | None:
        """The value of masks for voxels of which nobody knows what they are, None if the site has none."""
        known = {} if self.label_map is None else class_numbers(self.names, self.label_map)
        return len(self.names) + 1 if UNKNOWN in known.values() else None

    @property
    def labels(self) -> dict[int, int]:
        """The value that a saved label has by value of a mask: the smallest of the site's own for each class."""
        known = sorted(class_numbers(self.names, self.label_map).items(), reverse=True)
        place = {UNKNOWN: len(self.names) + 1}
        return {place.get(number, number): value for value, number in known if value <= _LARGEST}

    def stored(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A mask as the site's own label values: the way back of `read_truth`.

        Raises:
            PFedSAMError: E01 for a class that the site has no value for, or none that a label of 8 bits holds.
        """
        if self.label_map is None:
            return numbers
        value_of, named = self.labels, (*self.names, UNKNOWN_NAME)
        lacking = [named[number - 1] for number in found_values(numbers) if number not in value_of]
        if lacking:
            message = f"the site's label map has no value up to {_LARGEST} for {few(lacking)}."
            remedy = "Add it to 'labels' in local/pfedsam.json; the value for unknown to datalist.json."
            raise PFedSAMError(ErrorCode.SITE_SETTINGS, message, remedy)
        table = np.array([value_of.get(number, 0) for number in range(len(named) + 1)], dtype=np.uint8)
        return table[numbers]


@dataclass(frozen=True)
class Mask:
    """A segmentation of an image.

    Attributes:
        numbers: `(x, y, z)`, 0, a class number (of nested classes the inner one) or the one for unknown.
        channels: `(C, x, y, z)`, where each class is.
        unknown: `(x, y, z)`, where nobody knows what is there; None if everything is known.
    """

    numbers: NDArray[np.uint8]
    channels: NDArray[np.bool_]
    unknown: NDArray[np.bool_] | None = None

    @classmethod
    def of_truth(cls, numbers: NDArray[Any], channels: NDArray[Any], unknown: NDArray[np.bool_]) -> Mask:
        """A truth whose values where it is unknown mean nothing."""
        if not unknown.any():
            return cls(numbers.astype(np.uint8), channels.astype(bool))
        filled = np.where(unknown, len(channels) + 1, numbers).astype(np.uint8)
        return cls(filled, channels.astype(bool) & ~unknown, unknown)

    @classmethod
    def of_prediction(cls, found: Prediction) -> Mask:
        """What a model finds, in the grid of the image as a volume."""
        shape = found.image.volume_shape
        return cls(found.label().reshape(shape), (found.probabilities > 0.5).reshape(-1, *shape))


def read_truth(image: Picture, label: Path, classes: Classes) -> Mask:
    """The truth of an image as the bundle's training reads it.

    Raises:
        PFedSAMError: E04 if it differs in shape, E05 if it cannot be read, E07 for a value that is no class.
    """
    import torch

    from pfedsam.data.loading import ReadImaged
    from pfedsam.data.transforms import ClassChannelsd, class_map

    items = ReadImaged(("image", "label"), labels="label", colour=classes.colour)({"image": image, "label": label})
    channels = ClassChannelsd("label", classes.values, classes.names, classes.label_map)(items)["label"]
    shape = image.volume_shape
    numbers = class_map(torch.as_tensor(channels), values=classes.values).numpy().reshape(shape)
    told = np.asarray(channels).reshape(-1, *shape)
    return Mask.of_truth(numbers, told, told[0] == OPEN)


def read_values(image: Picture, label: Path, unknown: int | None = None) -> tuple[Mask, Classes]:
    """The truth of an image without a bundle: each value is a class of its own; black and white are 0 and 1.

    Args:
        image: of the label.
        label: file, or folder of a DICOM series.
        unknown: the site's value for unknown, None if it has none.

    Raises:
        PFedSAMError: as `read_truth`; E07 for more values than there can be classes.
    """
    from pfedsam.data.loading import ReadImaged

    items = ReadImaged(("image", "label"), labels="label")({"image": image, "label": label})
    values = np.asarray(items["label"]).reshape(image.volume_shape)
    found = [value for value in found_values(values) if value not in (0, unknown)]
    nowhere = values == unknown if unknown is not None else np.zeros(values.shape, dtype=bool)
    if black_and_white([0, *found], (1,)):
        values, found = (values > 0).astype(np.uint8), [1]
    top = max(found, default=1)
    if top > MOST_CLASSES or min(found, default=1) < 0:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"{label} holds values from {min(found)} to {top}, expected class numbers up to {MOST_CLASSES}.",
            "Correct it, or give the model that it is for.",
        )
    channels = np.stack([values == number for number in range(1, top + 1)])
    return Mask.of_truth(values, channels, nowhere), Classes.of_values(top, unknown)


def difference(found: Mask, truth: Mask) -> NDArray[np.uint8]:
    """`(x, y, z)`: 0, or the number in `AREAS` of what a place is, see `pfedsam.evaluation.difference`."""
    result = np.zeros(truth.numbers.shape, dtype=np.uint8)
    for name, area in areas_of(truth.channels, _judged(found, truth)).items():
        result[area] = AREAS[name]
    return result


def _judged(found: Mask, truth: Mask) -> NDArray[np.bool_]:
    """What was found where the truth says what is there: elsewhere nothing is right or wrong."""
    return found.channels if truth.unknown is None else found.channels & ~truth.unknown


def dice_of(found: Mask, truth: Mask) -> list[float]:
    """Dice of each class, as `pfedsam evaluate` has it: 1 where a class is empty in both, 0 where in one of them."""
    import torch
    from monai.metrics import compute_dice

    one, other = (torch.from_numpy(channels)[None] for channels in (_judged(found, truth), truth.channels))
    return [float(value) for value in compute_dice(one, other, ignore_empty=False)[0]]
