"""What the page compares: masks as class numbers, how two differ, and their Dice.

The functions import torch and MONAI: an image without a label or model is shown without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfedsam.bundles import class_names, find_bundle, is_rgb, literals_of
from pfedsam.data.labels import black_and_white, class_numbers, found_values
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.evaluation.difference import difference as areas_of

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
        names: of the classes; value n of a mask is the n-th.
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
    def of_bundle(cls, bundle: str, settings: Mapping[str, Any], label_map: Mapping[str, str] | None = None) -> Classes:
        """The classes of an installed bundle.

        Raises:
            PFedSAMError: E01 for a label map that names another class.
        """
        folder = find_bundle(bundle)
        names = tuple(class_names(folder))
        told = literals_of(bundle, settings).get("class_values")
        values = told if isinstance(told, list) else [[number] for number in range(1, len(names) + 1)]
        class_numbers(names, label_map)
        return cls(names, tuple(tuple(numbers) for numbers in values), is_rgb(folder), label_map)

    def stored(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class numbers as the site's own label values, the smallest of each class: the way back of `read_truth`.

        Raises:
            PFedSAMError: E01 for a class that the site has no value for, or none that a label of 8 bits holds.
        """
        if self.label_map is None:
            return numbers
        known = sorted(class_numbers(self.names, self.label_map).items(), reverse=True)
        value_of = {number: value for value, number in known if value <= _LARGEST}
        lacking = [self.names[number - 1] for number in found_values(numbers) if number not in value_of]
        if lacking:
            message = f"the site's label map has no value up to {_LARGEST} for {few(lacking)}."
            raise PFedSAMError(ErrorCode.SITE_SETTINGS, message, "Add it to 'labels' in local/pfedsam.json.")
        table = np.array([value_of.get(number, 0) for number in range(len(self.names) + 1)], dtype=np.uint8)
        return table[numbers]


@dataclass(frozen=True)
class Mask:
    """A segmentation of an image.

    Attributes:
        numbers: `(x, y, z)`, 0 or a class number; of nested classes the inner one.
        channels: `(C, x, y, z)`, where each class is.
    """

    numbers: NDArray[np.uint8]
    channels: NDArray[np.bool_]

    @classmethod
    def of_probabilities(cls, probabilities: NDArray[np.float32], shape: Sequence[int]) -> Mask:
        """What a model finds, in the grid `shape` of the image as a volume."""
        import torch

        from pfedsam.data.transforms import class_map

        numbers = class_map(torch.from_numpy(probabilities)).numpy()
        return cls(numbers.reshape(shape), (probabilities > 0.5).reshape(-1, *shape))


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
    numbers = class_map(torch.as_tensor(channels)).numpy().reshape(shape)
    return Mask(numbers, np.asarray(channels, dtype=bool).reshape(-1, *shape))


def read_values(image: Picture, label: Path) -> tuple[Mask, Classes]:
    """The truth of an image without a bundle: each value is a class of its own; black and white are 0 and 1.

    Raises:
        PFedSAMError: as `read_truth`; E07 for more values than there can be classes.
    """
    from pfedsam.data.loading import ReadImaged

    items = ReadImaged(("image", "label"), labels="label")({"image": image, "label": label})
    values = np.asarray(items["label"]).reshape(image.volume_shape)
    found = [value for value in found_values(values) if value]
    if black_and_white([0, *found], (1,)):
        values, found = (values > 0).astype(np.uint8), [1]
    top = max(found, default=1)
    if top > MOST_CLASSES or min(found, default=1) < 0:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"{label} holds values from {min(found)} to {top}, expected class numbers up to {MOST_CLASSES}.",
            "Correct it, or give the model that it is for.",
        )
    numbers = range(1, top + 1)
    classes = Classes(tuple(f"value {number}" for number in numbers), tuple((number,) for number in numbers))
    return Mask(values.astype(np.uint8), np.stack([values == number for number in numbers])), classes


def difference(found: Mask, truth: Mask) -> NDArray[np.uint8]:
    """`(x, y, z)`: 0, or the number in `AREAS` of what a place is, see `pfedsam.evaluation.difference`."""
    result = np.zeros(truth.numbers.shape, dtype=np.uint8)
    for name, area in areas_of(truth.channels, found.channels).items():
        result[area] = AREAS[name]
    return result


def dice_of(found: Mask, truth: Mask) -> list[float]:
    """Dice of each class, as `pfedsam evaluate` has it: 1 where a class is empty in both, 0 where in one of them."""
    import torch
    from monai.metrics import compute_dice

    one, other = (torch.from_numpy(mask.channels)[None] for mask in (found, truth))
    return [float(value) for value in compute_dice(one, other, ignore_empty=False)[0]]
