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
from pfedsam.data.labels import black_and_white, found_values
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: Values of a difference.
FOUND, MISSED, WRONG = 1, 2, 3
#: Classes of a label without a model: more are no segmentation that a person looks at.
MOST_CLASSES = 32


@dataclass(frozen=True)
class Classes:
    """What the values of masks mean.

    Attributes:
        names: of the classes; value n of a mask is the n-th.
        values: for each class the numbers that belong to it: of nested classes several.
        colour: whether the bundle takes colour pictures.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    colour: bool = False

    @classmethod
    def of_bundle(cls, bundle: str, settings: Mapping[str, Any]) -> Classes:
        """The classes of an installed bundle."""
        folder = find_bundle(bundle)
        names = tuple(class_names(folder))
        told = literals_of(bundle, settings).get("class_values")
        values = told if isinstance(told, list) else [[number] for number in range(1, len(names) + 1)]
        return cls(names, tuple(tuple(numbers) for numbers in values), is_rgb(folder))


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
    channels = ClassChannelsd("label", classes.values, classes.names)(items)["label"]
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
    """`(x, y, z)`: `FOUND` where both have the same class, `MISSED` where only the truth has one, `WRONG` where the
    model has one and the truth none or another.
    """
    result = np.zeros(truth.numbers.shape, dtype=np.uint8)
    result[(truth.numbers > 0) & (found.numbers == 0)] = MISSED
    result[(found.numbers > 0) & (found.numbers != truth.numbers)] = WRONG
    result[(found.numbers > 0) & (found.numbers == truth.numbers)] = FOUND
    return result


def dice_of(found: Mask, truth: Mask) -> list[float]:
    """Dice of each class, as `pfedsam evaluate` has it: 1 where a class is empty in both, 0 where in one of them."""
    import torch
    from monai.metrics import compute_dice

    one, other = (torch.from_numpy(mask.channels)[None] for mask in (found, truth))
    return [float(value) for value in compute_dice(one, other, ignore_empty=False)[0]]
