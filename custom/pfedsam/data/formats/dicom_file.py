"""One DICOM file through pydicom: its data set, whether it is an image of one channel, and its pixels in their unit."""

from __future__ import annotations

import zlib
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
from pfedsam.errors import ErrorCode, PFedSAMError

_RESCALE = ("RescaleSlope", "RescaleIntercept")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_UNPACK = "Save it uncompressed, as `gdcmconv --raw` does, or export it again."
WHOLE = "Give a folder that holds one whole series and nothing else."


def open_data_set(file: Path, pixels: bool) -> pydicom.Dataset:
    """The data set of a file that is an image of one channel.

    Args:
        file: DICOM file.
        pixels: with its pixels, which are not decoded yet.

    Raises:
        PFedSAMError: E05 naming the file and what is wrong.
    """
    if file.is_dir():
        raise wrong(f"{file} is a folder, expected a DICOM file")
    try:
        _check_deflated(file)
        data = pydicom.dcmread(file, stop_before_pixels=not pixels)
    except PFedSAMError:
        raise
    except InvalidDicomError:
        raise wrong(f"{file} is no DICOM file") from None
    except Exception as error:
        raise wrong(f"{file} is no DICOM file that can be read ({_first_line(error)})") from error
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
        raise wrong(f"{file} holds no pixels ({_what(data)})")
    kinds = [str(word).upper() for word in several(data.get("ImageType"))]
    if "MOSAIC" in kinds or _tiles(data) > 1:
        raise wrong(f"{file} is a mosaic, many slices as tiles of one image", "Convert it to NIfTI with dcm2niix.")
    if "LOCALIZER" in kinds:
        raise wrong(f"{file} is a localiser (ImageType LOCALIZER), no slice of a volume", "Leave it out.")
    photometric = str(data.get("PhotometricInterpretation", ""))
    if not photometric:
        raise missing(file, "PhotometricInterpretation")
    samples = int(data.get("SamplesPerPixel") or 1)
    if samples != 1 or not photometric.startswith("MONOCHROME"):
        raise wrong(
            f"{file} is in colour (PhotometricInterpretation '{photometric}', {samples} channels), expected grey",
            "Export photographs as PNG, for a bundle of colour pictures.",
        )
    for keyword in ("Rows", "Columns"):
        if not int(data.get(keyword) or 0):
            raise missing(file, keyword)
    check_claim(file, int(data.Rows) * int(data.Columns) * count_of(data) * int(data.get("BitsAllocated") or 8) // 8)


def _tiles(data: pydicom.Dataset) -> int:
    """NumberOfImagesInMosaic, which Siemens writes also where ImageType does not say that it is one."""
    try:
        return int(data.get_private_item(0x0019, 0x0A, "SIEMENS MR HEADER").value or 0)
    except KeyError:
        return 0


def pixels_of(file: Path, data: pydicom.Dataset) -> NDArray[Any]:
    """The pixels of a file, `(rows, columns)` or `(frames, rows, columns)`; its data set loses them."""
    try:
        # a data set's own `pixel_array` would keep a second copy
        pixels = np.asarray(pixel_array(data))
    except Exception as error:
        syntax = getattr(data.file_meta.get("TransferSyntaxUID"), "name", "no transfer syntax")
        told = f"{file} has pixels that cannot be read ({syntax}): {_first_line(error)}"
        raise wrong(told, _UNPACK) from error
    count, size = count_of(data), (int(data.Rows), int(data.Columns))
    if pixels.shape != ((count, *size) if count > 1 else size):
        raise wrong(f"{file} holds pixels of shape {list(pixels.shape)}, expected {count} frame(s) of {list(size)}")
    for keyword in _PIXELS:
        data.pop(keyword, None)
    return pixels


def in_unit(file: Path, scale: pydicom.Dataset, pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels in the unit of the modality (PS3.3, C.11.1), in single precision where there is a scale.

    Args:
        file: for messages.
        scale: data set with the slope and intercept, or with the look-up table.
        pixels: as they are stored.
    """
    given = [keyword for keyword in _RESCALE if scale.get(keyword) not in (None, "")]
    if not scale.get("ModalityLUTSequence") and len(given) == 1:
        # one says nothing without the other, and pydicom then leaves the pixels as they are
        absent = next(keyword for keyword in _RESCALE if keyword not in given)
        raise wrong(f"{file} has {given[0]} and no {absent}", "Export the series again with both.")
    if not scale.get("ModalityLUTSequence") and not given:
        return pixels
    scaled = apply_modality_lut(pixels, scale)
    return scaled.astype(np.float32) if scaled.dtype == np.float64 and pixels.dtype != np.float64 else scaled


def numbers_of(value: Any, keyword: str, length: int, what: str) -> list[float]:
    """The numbers of an attribute that must be there, so many."""
    if value is None or value == "":
        raise missing(what, keyword)
    try:
        found = [float(one) for one in several(value)]
    except (TypeError, ValueError):
        found = []
    if len(found) != length or not np.isfinite(found).all():
        raise wrong(f"{what} has {keyword} {value}, expected {length} numbers")
    return found


def count_of(data: pydicom.Dataset) -> int:
    """Frames of a file."""
    return int(data.get("NumberOfFrames") or 1)


def first_of(data: pydicom.Dataset, sequence: str) -> pydicom.Dataset | None:
    """The first item of a sequence, None if there is none."""
    items = several(data.get(sequence))
    return items[0] if items else None


def several(value: Any) -> list[Any]:
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


def missing(what: Path | str, keyword: str) -> PFedSAMError:
    """The error of an attribute that is not there."""
    remedy = "Export the series again with all its attributes (some anonymisers take geometry away), or convert it."
    return wrong(f"{what} lacks {named(keyword)}", remedy)


def wrong(sentence: str, remedy: str = WHOLE) -> PFedSAMError:
    """The error of a file that cannot be read as an image."""
    return PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"{sentence}.", remedy)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
