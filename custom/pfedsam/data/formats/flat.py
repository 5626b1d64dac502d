"""PNG, JPEG, TIFF and BMP through Pillow: the numbers or the colours that a viewer shows."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from pfedsam.data.limits import check_claim
from pfedsam.data.picture import Picture
from pfedsam.errors import ErrorCode, PFedSAMError

#: Bytes of a pixel of each of Pillow's modes, where it is not one byte a band.
_BYTES = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
#: White in 16 bits.
WHITE_16 = 65535
#: EXIF orientations that exchange rows and columns.
_SIDEWAYS = (5, 6, 7, 8)
#: Tags of TIFF, and the value of the first that says that 0 is white: Pillow turns 8 bits of it, not 16.
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SAMPLES, _PLANES, _DEPTH = 262, 258, 339, 277, 284, 32997
_WHITE_IS_ZERO, _SIGNED, _SEPARATE = 0, 2, 2
#: Where PNG keeps the bits of a sample.
_PNG_BITS = 24
#: What ImageJ, OME and tifffile say in TIFF's description of more than one grey stack.
_MANY = re.compile(r"^(channels|frames)=(\d+)|\bSize([CT])=\"(\d+)\"", re.MULTILINE)
_PLANES_SAID = re.compile(r"^ImageJ=.*?^images=(\d+)", re.MULTILINE | re.DOTALL)
_SHAPE_SAID = re.compile(r'^\{"shape": \[([\d, ]+)\]')
_OPENING = threading.Lock()


def read(path: Path, label: bool) -> Picture:
    """Read a picture, or the pages of a TIFF as the slices of a volume.

    Grey values are those that are stored, up to 16 bits as integers and with white at 255 or 65535; black-and-white
    images are 0 and 255. Palettes and CMYK become colours. The picture is turned upright as EXIF says. A label keeps
    its palette's indices, and black-and-white is 0 and 1.

    Raises:
        PFedSAMError: E05 for transparent pixels, an animation, pages that differ or are in colour, a colour space
            without a rule here, or a file that claims too much (`pfedsam.data.limits`).
        Exception: what Pillow raises for a file that it cannot read.
    """
    with _opened(path) as image:
        pages = getattr(image, "n_frames", 1)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
        _check_pages(path, image, pages)
        # a camera's JPEG may hold previews behind the picture
        if pages == 1 or image.format in ("JPEG", "MPO"):
            values, white, notes = _values(path, image, label)
        elif image.format == "TIFF":
            return _stack(path, image, pages, label)
        else:
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE, f"{path} is an animation of {pages} frames.", "Save the one picture meant."
            )
    if turned:
        notes += ("turned upright, as its EXIF orientation says",)
    return Picture(values, "picture", path, white=white, notes=notes)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Pillow's image, its header only. The limit on what it may claim is ours: Pillow's cannot be set for one file."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        pixel = _BYTES.get(image.mode, len(image.getbands()))
        check_claim(path, image.width * image.height * pixel * getattr(image, "n_frames", 1))
        yield image


def _stack(path: Path, image: Image.Image, pages: int, label: bool) -> Picture:
    planes: list[NDArray[Any]] = []
    for page in range(pages):
        image.seek(page)
        values, white, notes = _values(path, image, label)
        if values.ndim != 2:
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE, f"{path}: page {page + 1} of {pages} is in colour.", "Save grey slices."
            )
        if planes and (values.shape, values.dtype) != (planes[0].shape, planes[0].dtype):
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"{path}: page {page + 1} of {pages} is {values.dtype}{list(values.shape)}, page 1 is "
                f"{planes[0].dtype}{list(planes[0].shape)}: they are no slices of a volume.",
                "Save the page that is meant as a file of its own.",
            )
        planes.append(values)
    notes += (f"{pages} pages, read as the slices of a volume",)
    return Picture(np.stack(planes, axis=-1), "volume", path, white=white, notes=notes)


def _values(path: Path, image: Image.Image, label: bool) -> tuple[NDArray[Any], float | None, tuple[str, ...]]:
    """Values `(x, y)` or `(x, y, 3)` of an image or page, upright; the value of white; what to know of it."""
    tags = getattr(image, "tag_v2", {})
    bits = _bits(path, image)
    _check_sideways(path, image)
    _check_samples(path, image, bits, label)
    # asked before the image is turned, which gives another one without the file's tags
    mode, of_tiff = image.mode, image.format == "TIFF"
    sixteen = mode in _SIXTEEN or (mode == "I" and image.format == "PNG")
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    inverted = sixteen and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image, notes = _plain(path, ImageOps.exif_transpose(image), label)
    values = np.swapaxes(np.asarray(image), 0, 1)
    if sixteen:
        values = values.astype(np.uint16)
        return (WHITE_16 - values if inverted else values), float(WHITE_16), notes
    if mode == "I" and of_tiff and bits == 32 and not signed:
        values = values.view(np.uint32)
    if mode == "L" and bits == 8 and signed:
        return values.view(np.int8), None, notes
    if mode == "L" and bits in (2, 4) and label:
        # Pillow stretches them to 8 bits: right for what is seen, not for the numbers of a label
        values = values // (255 // (2**bits - 1))
    return values, None if image.mode in ("I", "F") else 255.0, notes


def _check_sideways(path: Path, image: Image.Image) -> None:
    """Refuse what Pillow scrambles (11.0 to 13.0 at least): TIFF without compression that is to be turned sideways."""
    orientation = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation)
    tiles = getattr(image, "tile", None)
    if orientation in _SIDEWAYS and tiles and tiles[0][0] == "raw":
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has the EXIF orientation {orientation} and no compression, which cannot be read reliably.",
            "Save it upright.",
        )


def _bits(path: Path, image: Image.Image) -> int:
    """Bits of a sample as they are stored."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(_PNG_BITS + 1)[_PNG_BITS]
    stored = getattr(image, "tag_v2", {}).get(_BITS)
    return int(stored[0]) if stored else 8 * _BYTES.get(image.mode, 1)


def _check_samples(path: Path, image: Image.Image, bits: int, label: bool) -> None:
    """Refuse samples that Pillow does not give as they are stored."""
    tags, samples = getattr(image, "tag_v2", {}), len(image.getbands())
    if tags.get(_SAMPLES, samples) != samples:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has {tags[_SAMPLES]} samples a pixel, of which {samples} can be read.",
            "Save one channel.",
        )
    if bits > 8 and samples > 1 and tags.get(_PLANES) == _SEPARATE:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has colour planes of {bits} bits one after the other, which cannot be read reliably.",
            "Save it with 8 bits, or with the colours of a pixel together.",
        )
    if label and bits > 8 and samples > 1:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"label '{path}' has {samples} channels of {bits} bits, of which 8 bits would be read.",
            "Store the label as one channel of integers.",
        )
    if label and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"label '{path}' says that 0 is white: whether white or black is the foreground is not known.",
            "Store the label as plain numbers (black is zero).",
        )


def _check_pages(path: Path, image: Image.Image, pages: int) -> None:
    """Refuse a TIFF that holds more than the one grey stack that its pages are, by what its writer said of it."""
    tags = getattr(image, "tag_v2", {})
    said = str(tags.get(ExifTags.Base.ImageDescription, ""))
    if not said.startswith("ImageJ=") and "Size" not in said and "shape" not in said and not tags.get(_DEPTH):
        return
    for word, many, axis, size in _MANY.findall(said):
        if int(many or size) > 1:
            what = {"channels": "channels", "C": "channels"}.get(word or axis, "time points")
            raise PFedSAMError(
                ErrorCode.UNREADABLE_IMAGE,
                f"{path} holds {many or size} {what}, expected one grey stack.",
                "Save one of them alone.",
            )
    planes = _PLANES_SAID.search(said)
    shape = _SHAPE_SAID.search(said)
    told = int(planes.group(1)) if planes else int(tags.get(_DEPTH, 1))
    if shape:
        sizes = [int(size) for size in shape.group(1).split(",")]
        told = int(np.prod(sizes)) // (image.width * image.height * int(tags.get(_SAMPLES, 1)))
    if told > pages:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} holds {told} slices, of which {pages} can be read.",
            "Save each slice as a page of its own.",
        )


def _plain(path: Path, image: Image.Image, label: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """The image in a mode that holds plain numbers or colours."""
    mode = image.mode
    if label and mode in ("P", "1"):
        # a palette's indices, also where it has transparent entries; black and white as 0 and 1
        return Image.fromarray(np.asarray(image).astype(np.uint8)), ()
    if mode in _WITH_ALPHA or "transparency" in image.info:
        return _without_alpha(path, image)
    if mode == "1":
        return image.convert("L"), ()
    if mode in ("L", "RGB", "I", "F", *_SIXTEEN):
        return image, ()
    if mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
        word = {"P": "palette", "RGBX": "RGB"}.get(mode, mode)
        return image.convert("RGB"), (f"its {word} is read as colours",)
    raise PFedSAMError(ErrorCode.UNREADABLE_IMAGE, f"{path} is in the colour space {mode}.", "Save it as grey or RGB.")


def _without_alpha(path: Path, image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An image whose alpha channel says nothing, without it. What shows through another depends on the viewer."""
    if image.mode in ("I", *_SIXTEEN):
        # one grey value is transparent
        clear = int(np.count_nonzero(np.asarray(image) == image.info["transparency"]))
    else:
        clear = int(np.count_nonzero(np.asarray(image.convert("RGBA").getchannel("A")) < 255))
    if clear:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has an alpha channel with {clear} transparent pixel(s): what is seen there depends on the viewer.",
            "Flatten it: save it without transparency.",
        )
    if image.mode in ("I", *_SIXTEEN):
        return image, ()
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"), ()
