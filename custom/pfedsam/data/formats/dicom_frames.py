"""The frames of DICOM files: each has a place of its own.

Its position, orientation and pixel spacing stand in the data set or, in multi-frame objects, in the functional groups
(PS3.3, C.7.6.16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from pfedsam.data.formats.dicom_file import count_of, first_of, numbers_of, several, wrong

#: Row and column directions may be so far from unit length and a right angle.
_UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Frame:
    """One slice of a volume, in the patient's coordinates of DICOM (left, posterior, superior, in millimetres).

    Attributes:
        file: that it is in.
        data: the file's data set.
        number: of the frame in its file, from 0.
        position: of the centre of its first pixel.
        row, column: directions in which the column's and the row's index grow.
        spacing: between rows, between columns.
        values: data set with the slope and intercept of its values.
    """

    file: Path
    data: pydicom.Dataset
    number: int
    position: NDArray[np.float64]
    row: NDArray[np.float64]
    column: NDArray[np.float64]
    spacing: tuple[float, float]
    values: pydicom.Dataset

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.file.name}, frame {self.number + 1}" if count_of(self.data) > 1 else self.file.name

    @property
    def corners(self) -> NDArray[np.float64]:
        """From the first pixel to the last of the first row, and of the first column, `(2, 3)`."""
        down, across = self.spacing
        size = (int(self.data.Columns) - 1) * across, (int(self.data.Rows) - 1) * down
        return np.stack([self.row * size[0], self.column * size[1]])

    @property
    def thickness(self) -> float:
        """Millimetres from one slice to the next where there is one only."""
        measures = [self.data]
        for sequence in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
            group = first_of(self.data, sequence)
            item = first_of(group, "PixelMeasuresSequence") if group is not None else None
            measures += [item] if item is not None else []
        found = (float(one.get(key) or 0) for one in measures for key in ("SpacingBetweenSlices", "SliceThickness"))
        return next((abs(length) for length in found if length), 1.0)


def frames_of(file: Path, data: pydicom.Dataset) -> Iterator[Frame]:
    """The frames of a file in their order.

    Raises:
        PFedSAMError: E05 naming the frame and the attribute for a place that is missing or none.
    """
    count = count_of(data)
    shared = (several(data.get("SharedFunctionalGroupsSequence")) or [pydicom.Dataset()])[0]
    own = several(data.get("PerFrameFunctionalGroupsSequence"))
    if count > 1 and not (own or shared):
        raise wrong(f"{file} has {count} frames and no functional groups that say where each frame lies")
    if own and len(own) != count:
        raise wrong(f"{file} has {count} frames, but functional groups of {len(own)}")
    for number in range(count):
        groups = ([own[number]] if own else []) + [shared]
        what = f"{file} (frame {number + 1})" if count > 1 else str(file)

        def numbers(sequence: str, keyword: str, length: int, groups: Any = groups, what: str = what) -> list[float]:
            return numbers_of(_place(groups, sequence, keyword, data), keyword, length, what)

        orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
        row, column = np.asarray(orientation).reshape(2, 3)
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if not np.allclose(lengths, 1, atol=_UNIT_TOLERANCE) or abs(row @ column) > _UNIT_TOLERANCE:
            raise wrong(f"{what} has ImageOrientationPatient {orientation}, no two directions at a right angle")
        down, across = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        if down <= 0 or across <= 0:
            raise wrong(f"{what} has PixelSpacing {[down, across]}, expected two lengths")
        position = np.asarray(numbers("PlanePositionSequence", "ImagePositionPatient", 3))
        scale = next((s for group in groups if (s := first_of(group, "PixelValueTransformationSequence"))), data)
        yield Frame(file, data, number, position, row, column, (down, across), scale)


def _place(groups: Sequence[pydicom.Dataset], sequence: str, keyword: str, data: pydicom.Dataset) -> Any:
    """The value of a tag in the frame's functional groups, else in the shared ones, else in the data set."""
    for group in groups:
        item = first_of(group, sequence)
        if item is not None and item.get(keyword) is not None:
            return item.get(keyword)
    return data.get(keyword)
