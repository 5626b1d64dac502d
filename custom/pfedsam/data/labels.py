"""What the values of a label mean: whole numbers, black and white, unknown. Check, prepare and training share it.

A label may leave voxels open (scribbles, points, boxes, blocks): a value that the site names says that nobody knows
what is there. A case without a label is open everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError, few

#: A value this near to a whole number is that number: a scale in a header makes 0.9999999 of 1.
ROUNDING = 1e-2
#: Values that are counted at a time.
_PART = 1 << 15
#: Foreground where a mask was stored as black and white, in 8 and in 16 bits.
WHITES = (255, 65535)
#: Name in a label map of the value of voxels of which nobody knows what they are.
UNKNOWN_NAME = "unknown"
#: Its number, in the place of a class; and the value of an image that has no label: no file of labels holds it.
UNKNOWN = int(np.iinfo(np.int16).min)
#: In the channels `(C, ...)` of a label, beside 0 and 1: all channels of a voxel hold it or none.
OPEN = 2


def as_label(picture: Picture) -> Picture:
    """A picture that was read, as a label: one channel of whole numbers.

    Raises:
        PFedSAMError: E07 for channels that differ, or a value that is no whole number.
    """
    values = picture.values
    if picture.is_colour:
        if (values != values[..., :1]).any():
            raise PFedSAMError(
                ErrorCode.LABEL_OUT_OF_RANGE,
                f"label '{picture.source}' has {values.shape[-1]} different channels, expected one.",
                "Store the label as one channel of integers; a palette keeps its numbers.",
            )
        values = values[..., 0]
    return replace(picture, values=whole_numbers(values, str(picture.source)))


def whole_numbers(values: NDArray[Any], source: str) -> NDArray[Any]:
    """Label values as integers, in the smallest type that holds them.

    Args:
        values: of any real type, finite.
        source: of the values, for the message.

    Raises:
        PFedSAMError: E07 for a value that is more than `ROUNDING` away from a whole number.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        off = np.abs(values - rounded) > ROUNDING
        if off.any():
            wrong = np.unique(values[off])
            raise PFedSAMError(
                ErrorCode.LABEL_OUT_OF_RANGE,
                f"label '{source}' holds {few(f'{value:.6g}' for value in wrong)}, expected whole numbers.",
                "Store class numbers; a label that was resampled needs nearest-neighbour interpolation.",
            )
        values = rounded
    low, high = int(values.min()), int(values.max())
    kinds = (np.uint8, np.int16, np.int32)
    kind = next((one for one in kinds if np.iinfo(one).min <= low and high <= np.iinfo(one).max), None)
    if kind is None:
        far = high if high > np.iinfo(np.int32).max else low
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE, f"label '{source}' holds {far:g}, which is no class number.", "Correct it."
        )
    return values.astype(kind, copy=False)


def found_values(values: NDArray[Any]) -> list[int]:
    """The different values of a label of whole numbers, sorted."""
    if values.dtype == np.uint8:
        # no sorting, and in parts that stay in the processor's cache: a volume has millions of values
        flat, counts = values.ravel(order="K"), np.zeros(256, dtype=np.int64)
        for first in range(0, flat.size, _PART):
            counts += np.bincount(flat[first : first + _PART], minlength=256)
        return np.flatnonzero(counts).tolist()
    return np.unique(values).tolist()


def black_and_white(found: Iterable[int], known: Collection[int]) -> int | None:
    """The value of white in a label that holds black and white only, where white is no known value; else None."""
    others = set(found) - {0}
    return next((white for white in WHITES if others == {white} and white not in known), None)


def class_numbers(names: Sequence[str], label_map: Mapping[str, str] | None = None) -> dict[int, int]:
    """Class number by label value.

    Args:
        names: of the classes.
        label_map: name of a class, `background` or `unknown` by value; None for values that are the class numbers.

    Returns:
        Class number, or `UNKNOWN`, by value.

    Raises:
        PFedSAMError: E01 for a value that is no number or a name that is no class.
    """
    numbers = {name: number for number, name in enumerate(["background", *names])}
    if label_map is None:
        return {number: number for number in numbers.values()}
    numbers = {UNKNOWN_NAME: UNKNOWN} | numbers  # a class may have that name
    found = {0: 0}
    for value, name in label_map.items():
        if name not in numbers or not str(value).isdigit():
            remedy = f"Value: one of {list(numbers)}."
            raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"the label map says {value!r}: {name!r}.", remedy)
        found[int(value)] = numbers[name]
    return found


def with_unknown(
    label_map: Mapping[str, str] | None, names: Sequence[str], unknown: int | None
) -> Mapping[str, str] | None:
    """A label map that also says which value is unknown.

    Args:
        label_map: see `class_numbers`.
        names: of the classes.
        unknown: the value that the site names in its `datalist.json`, None for none.

    Raises:
        PFedSAMError: E08 if the value is one of the classes.
    """
    if unknown is None:
        return label_map
    told = {str(number): name for number, name in enumerate(names, 1)} if label_map is None else dict(label_map)
    if told.get(str(unknown), UNKNOWN_NAME) != UNKNOWN_NAME:
        raise PFedSAMError(
            ErrorCode.WRONG_SPLIT,
            f"datalist.json says that the label value {unknown} is unknown, and it is '{told[str(unknown)]}'.",
            "Take a value that is no class, for example 254.",
        )
    return told | {str(unknown): UNKNOWN_NAME}
