"""DICOM through pydicom: a series, one slice, or frames of a multi-frame object, as one volume in space.

Every frame has its own place: its position, orientation and pixel spacing, which stand in the data set or, in
multi-frame objects, in the functional groups (PS3.3, C.7.6.16). The volume's affine is what all frames agree on, within
`TOLERANCE`; a gantry that is tilted gives a sheared one. Numbers are compared, never their text.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_modality_lut, pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian

from pfedsam.data.limits import check_claim, limit_bytes
from pfedsam.data.picture import Picture
from pfedsam.data.suffixes import visible
from pfedsam.errors import ErrorCode, PFedSAMError

#: How far a voxel may lie from where the volume's affine says: so many voxels, or so many millimetres if that is more
#: (positions are often rounded to a tenth), but never more than a share of a voxel.
TOLERANCE, TOLERANCE_MM, LARGEST_TOLERANCE = 0.05, 0.1, 0.25
#: No gantry tilts so far, in degrees.
LARGEST_TILT = 45.0
#: Positions that are no farther from a line, in millimetres, are not rounded.
_EXACT = 1e-4
#: Row and column directions may be so far from unit length and a right angle.
_UNIT_TOLERANCE = 1e-2
#: A tilt is told from this angle on, in degrees.
_TOLD_TILT = 0.1
_RESCALE = ("RescaleSlope", "RescaleIntercept")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ONE = "Give each slice once: one time point, echo or segment."
_WHOLE = "Give a folder that holds one whole series and nothing else."


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
        return f"{self.file.name}, frame {self.number + 1}" if _count(self.data) > 1 else self.file.name

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
            group = _first(self.data, sequence)
            item = _first(group, "PixelMeasuresSequence") if group is not None else None
            measures += [item] if item is not None else []
        found = (float(one.get(key) or 0) for one in measures for key in ("SpacingBetweenSlices", "SliceThickness"))
        return next((abs(length) for length in found if length), 1.0)


def read(path: Path, label: bool = False) -> Picture:
    """Read a folder of one series, or one file of one or many frames.

    Args:
        path: folder or file.
        label: whether it is a label: then it may be a segmentation object.

    Returns:
        Values `(x, y, z)` in the unit of the modality (rescaled, or through its look-up table), slices by position.

    Raises:
        PFedSAMError: E02 for an empty folder; E05 naming the file, frame and tag for what is no volume of one channel:
            other objects, colour, mosaics, localisers, a missing tag, slices that are missing, double or lie elsewhere.
    """
    frames = _in_order(path, pixels=True)
    if not label and any(frame.data.get("Modality") == "SEG" for frame in frames):
        raise _wrong(f"{path} is a segmentation object, no image", "Give the series that it belongs to.")
    affine, notes = _affine(path, frames)
    many = {frame.file: _pixels(frame) for frame in frames if _count(frame.data) > 1 and frame.number == 0}
    planes = []
    for frame in frames:
        pixels = many[frame.file][frame.number] if frame.file in many else _pixels(frame)
        planes.append(_in_unit(frame, pixels).T)
    return Picture(np.stack(planes, axis=-1), "volume", path, affine, notes=notes)


def slices_of(path: Path) -> list[Frame]:
    """The slices of a volume in its order, without pixels: to refer to them.

    Raises:
        PFedSAMError: as `read`.
    """
    return _in_order(path, pixels=False)


def _in_order(path: Path, pixels: bool) -> list[Frame]:
    """The frames of a volume, by their position along the normal of the first."""
    files = list(visible(path)) if path.is_dir() else [path]
    if not files:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"{path} holds no file.", _WHOLE)
    frames = [frame for file in files for frame in _frames(file, _data_set(file, pixels))]
    first = frames[0]
    for keyword in ("SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        for frame in frames:
            if frame.data.get(keyword) != first.data.get(keyword):
                raise _wrong(f"{path}: slices differ in {keyword} ({first.name} and {frame.name})")
    normal = np.cross(first.row, first.column)
    return sorted(frames, key=lambda frame: float(normal @ frame.position))


def _data_set(file: Path, pixels: bool) -> pydicom.Dataset:
    if file.is_dir():
        raise _wrong(f"{file} is a folder, expected a DICOM file")
    try:
        _check_deflated(file)
        data = pydicom.dcmread(file, stop_before_pixels=not pixels)
    except PFedSAMError:
        raise
    except InvalidDicomError:
        raise _wrong(f"{file} is no DICOM file") from None
    except Exception as error:
        raise _wrong(f"{file} is no DICOM file that can be read ({_first_line(error)})") from error
    _check_kind(file, data, pixels)
    return data


def _check_deflated(file: Path) -> None:
    """A deflated data set is unpacked before its first tag can be read: so far as the limit goes, to be sure."""
    meta = read_file_meta_info(file)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    # preamble, mark, the element with the group's length, the group
    start = 132 + 12 + int(meta.FileMetaInformationGroupLength)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    size = len(unpacker.decompress(file.read_bytes()[start:], limit_bytes()))
    check_claim(file, size + (1 if unpacker.unconsumed_tail else 0))


def _check_kind(file: Path, data: pydicom.Dataset, pixels: bool) -> None:
    """Refuse what is no image of one channel, by what it is."""
    if pixels and not any(keyword in data for keyword in _PIXELS):
        raise _wrong(f"{file} holds no pixels ({_what(data)})")
    kinds = [str(word).upper() for word in _several(data.get("ImageType"))]
    if "MOSAIC" in kinds or _tiles(data) > 1:
        raise _wrong(f"{file} is a mosaic, many slices as tiles of one image", "Convert it to NIfTI with dcm2niix.")
    if "LOCALIZER" in kinds:
        raise _wrong(f"{file} is a localiser (ImageType LOCALIZER), no slice of a volume", "Leave it out.")
    photometric = str(data.get("PhotometricInterpretation", ""))
    if not photometric:
        raise _missing(file, "PhotometricInterpretation")
    samples = int(data.get("SamplesPerPixel") or 1)
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise _wrong(
            f"{file} is in colour (PhotometricInterpretation '{photometric}', {samples} channels), expected grey",
            "Export photographs as PNG, for a bundle of colour pictures.",
        )
    for keyword in ("Rows", "Columns"):
        if not int(data.get(keyword) or 0):
            raise _missing(file, keyword)
    check_claim(file, int(data.Rows) * int(data.Columns) * _count(data) * int(data.get("BitsAllocated") or 8) // 8)


def _tiles(data: pydicom.Dataset) -> int:
    """NumberOfImagesInMosaic, which Siemens writes also where ImageType does not say that it is one."""
    try:
        return int(data.get_private_item(0x0019, 0x0A, "SIEMENS MR HEADER").value or 0)
    except KeyError:
        return 0


def _frames(file: Path, data: pydicom.Dataset) -> Iterator[Frame]:
    count = _count(data)
    shared = (_several(data.get("SharedFunctionalGroupsSequence")) or [pydicom.Dataset()])[0]
    own = _several(data.get("PerFrameFunctionalGroupsSequence"))
    if count > 1 and not (own or shared):
        raise _wrong(f"{file} has {count} frames and no functional groups that say where each frame lies")
    if own and len(own) != count:
        raise _wrong(f"{file} has {count} frames, but functional groups of {len(own)}")
    for number in range(count):
        groups = ([own[number]] if own else []) + [shared]
        what = f"{file} (frame {number + 1})" if count > 1 else str(file)

        def numbers(sequence: str, keyword: str, length: int, groups: Any = groups, what: str = what) -> list[float]:
            return _numbers(_place(groups, sequence, keyword, data), keyword, length, what)

        orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
        row, column = np.asarray(orientation).reshape(2, 3)
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if not np.allclose(lengths, 1, atol=_UNIT_TOLERANCE) or abs(row @ column) > _UNIT_TOLERANCE:
            raise _wrong(f"{what} has ImageOrientationPatient {orientation}, no two directions at a right angle")
        down, across = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
        if down <= 0 or across <= 0:
            raise _wrong(f"{what} has PixelSpacing {[down, across]}, expected two lengths")
        position = np.asarray(numbers("PlanePositionSequence", "ImagePositionPatient", 3))
        scale = next((s for group in groups if (s := _first(group, "PixelValueTransformationSequence"))), data)
        yield Frame(file, data, number, position, row, column, (down, across), scale)


def _place(groups: Sequence[pydicom.Dataset], sequence: str, keyword: str, data: pydicom.Dataset) -> Any:
    """The value of a tag in the frame's functional groups, else in the shared ones, else in the data set."""
    for group in groups:
        item = _first(group, sequence)
        if item is not None and item.get(keyword) is not None:
            return item.get(keyword)
    return data.get(keyword)


def _numbers(value: Any, keyword: str, length: int, what: str) -> list[float]:
    if value is None or value == "":
        raise _missing(what, keyword)
    try:
        found = [float(one) for one in _several(value)]
    except (TypeError, ValueError):
        found = []
    if len(found) != length or not np.isfinite(found).all():
        raise _wrong(f"{what} has {keyword} {value}, expected {length} numbers")
    return found


def _affine(path: Path, frames: Sequence[Frame]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Voxel indices to millimetres right, anterior, superior, after every frame was found where it says."""
    first = frames[0]
    down, across = first.spacing
    normal = np.cross(first.row, first.column)
    step, origin = normal * first.thickness, first.position
    notes: tuple[str, ...] = ()
    if len(frames) > 1:
        positions = np.stack([frame.position for frame in frames])
        _check_steps(path, frames, positions @ normal)
        step, origin = _line(positions)
        notes = _tilt(path, step, normal)
    directions = np.stack([first.row * across, first.column * down, step], axis=1)
    for number, frame in enumerate(frames):
        _check_place(path, frame, first, origin + number * step, directions)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions, origin
    # DICOM's axes point left and posterior, NIfTI's right and anterior
    affine[:2] *= -1
    return affine, notes


def _line(positions: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The step and the origin of evenly spaced positions: of the first and the last, unless all are rounded."""
    numbers = np.arange(len(positions))
    step, origin = (positions[-1] - positions[0]) / (len(positions) - 1), positions[0]
    if _EXACT < np.abs(positions - origin - numbers[:, None] * step).max() < 2 * TOLERANCE_MM:
        step, origin = np.polyfit(numbers, positions, 1)
    return step, origin


def _check_steps(path: Path, frames: Sequence[Frame], along: NDArray[np.float64]) -> None:
    """Whether slices follow each other evenly along the normal."""
    steps = np.diff(along)
    step = float(np.median(steps))
    allowed = max(TOLERANCE * step, min(2 * TOLERANCE_MM, LARGEST_TOLERANCE * step))
    double = np.flatnonzero(steps <= min(allowed, step / 2))
    if step <= 0 or len(double):
        a, b = (frames[(double[0] if len(double) else 0) + n].name for n in (0, 1))
        raise _wrong(f"{path}: slices are missing or double: {a} and {b} lie at the same position", _ONE)
    uneven = np.flatnonzero(np.abs(steps - step) > allowed)
    if len(uneven):
        at = int(uneven[0])
        raise _wrong(
            f"{path}: slices are missing or double between slices {at + 1} and {at + 2} ({frames[at].name} and "
            f"{frames[at + 1].name} are {steps[at]:.2f} mm apart, expected {step:.2f} mm)",
        )


def _check_place(
    path: Path, frame: Frame, first: Frame, expected: NDArray[np.float64], directions: NDArray[np.float64]
) -> None:
    """Whether the corners of a frame lie where the affine says."""
    turned = frame.corners - first.corners
    shifted = frame.position - expected
    inside = "ImageOrientationPatient" if np.allclose(frame.spacing, first.spacing, rtol=1e-3) else "PixelSpacing"
    for what, distance in (
        (inside, turned),
        ("ImagePositionPatient", shifted[None]),
    ):
        voxels = np.abs(np.linalg.solve(directions, distance.T)).T
        sizes = np.linalg.norm(directions, axis=0)
        if (voxels > np.clip(TOLERANCE_MM / sizes, TOLERANCE, LARGEST_TOLERANCE)).any():
            far = float(np.linalg.norm(distance, axis=1).max())
            raise _wrong(f"{path}: {what} of {frame.name} is {far:.2f} mm off what the other slices say")


def _tilt(path: Path, step: NDArray[np.float64], normal: NDArray[np.float64]) -> tuple[str, ...]:
    cosine = float(step @ normal / (np.linalg.norm(step) * np.linalg.norm(normal)))
    angle = float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    if angle > LARGEST_TILT:
        raise _wrong(f"{path}: slices walk sideways, {angle:.0f} degrees off their normal, which is no tilted gantry")
    return (f"the gantry is tilted by {angle:.1f} degrees: its affine is sheared",) if angle > _TOLD_TILT else ()


def _pixels(frame: Frame) -> NDArray[Any]:
    """The pixels of a frame's file, `(rows, columns)` or `(frames, rows, columns)`; the file's data set loses them."""
    try:
        # a data set's own `pixel_array` would keep a second copy
        pixels = np.asarray(pixel_array(frame.data))
    except Exception as error:
        syntax = getattr(frame.data.file_meta.get("TransferSyntaxUID"), "name", "no transfer syntax")
        raise _wrong(f"{frame.file} has pixels that cannot be read ({syntax}): {_first_line(error)}") from error
    count, size = _count(frame.data), (int(frame.data.Rows), int(frame.data.Columns))
    if pixels.shape != ((count, *size) if count > 1 else size):
        raise _wrong(
            f"{frame.file} holds pixels of shape {list(pixels.shape)}, expected {count} frame(s) of {list(size)}"
        )
    for keyword in _PIXELS:
        frame.data.pop(keyword, None)
    return pixels


def _in_unit(frame: Frame, pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels in the unit of the modality (PS3.3, C.11.1), in single precision where there is a scale."""
    scale = frame.values
    given = [keyword for keyword in _RESCALE if scale.get(keyword) not in (None, "")]
    if not scale.get("ModalityLUTSequence") and len(given) == 1:
        # one says nothing without the other, and pydicom then leaves the pixels as they are
        missing = next(keyword for keyword in _RESCALE if keyword not in given)
        raise _wrong(f"{frame.file} has {given[0]} and no {missing}", "Export the series again with both.")
    if not scale.get("ModalityLUTSequence") and not given:
        return pixels
    scaled = apply_modality_lut(pixels, scale)
    return scaled.astype(np.float32) if scaled.dtype == np.float64 and pixels.dtype != np.float64 else scaled


def _count(data: pydicom.Dataset) -> int:
    return int(data.get("NumberOfFrames") or 1)


def _first(data: pydicom.Dataset, sequence: str) -> pydicom.Dataset | None:
    items = _several(data.get(sequence))
    return items[0] if items else None


def _several(value: Any) -> list[Any]:
    """The values of an element that may have none, one or many."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple, pydicom.multival.MultiValue, pydicom.Sequence)) else [value]


def _what(data: pydicom.Dataset) -> str:
    kind = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    name = getattr(kind, "name", "")
    return f"{name or 'no SOPClassUID'}, Modality {data.get('Modality') or 'unknown'}"


def named(keyword: str) -> str:
    """An attribute by its keyword and its tag, for messages."""
    tag = tag_for_keyword(keyword) or 0
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _missing(what: Path | str, keyword: str) -> PFedSAMError:
    remedy = "Export the series again with all its attributes (some anonymisers take geometry away), or convert it."
    return _wrong(f"{what} lacks {named(keyword)}", remedy)


def _wrong(sentence: str, remedy: str = _WHOLE) -> PFedSAMError:
    return PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"{sentence}.", remedy)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
