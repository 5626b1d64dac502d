"""PNG, JPEG, TIFF and BMP through Pillow: the numbers or the colours that a viewer shows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from pfedsam.data.limits import check_claim
from pfedsam.data.pictures import Picture
from pfedsam.errors import PFedSAMError

#: Bytes of a pixel of each of Pillow's modes, where it is not one byte a band.
_BYTES = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
#: White in 16 bits.
WHITE_16 = 65535
#: EXIF orientations that exchange rows and columns.
_SIDEWAYS = (5, 6, 7, 8)
#: Tags of TIFF, and the value of the first that says that 0 is white: Pillow turns 8 bits of it, not 16.
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
_WHITE_IS_ZERO = 0
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
        # a camera's JPEG may hold previews behind the picture
        if pages == 1 or image.format in ("JPEG", "MPO"):
            values, white, notes = _values(path, image, label)
        elif image.format == "TIFF":
            return _stack(path, image, pages, label)
        else:
            raise PFedSAMError("E05", f"{path} is an animation of {pages} frames.", "Save the one picture meant.")
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
            raise PFedSAMError("E05", f"{path}: page {page + 1} of {pages} is in colour.", "Save grey slices.")
        if planes and (values.shape, values.dtype) != (planes[0].shape, planes[0].dtype):
            raise PFedSAMError(
                "E05",
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
    _check_sideways(path, image)
    sixteen = image.mode in _SIXTEEN or (image.format == "PNG" and image.mode == "I")
    # loaded first: the tags are needed as they are in the file, and turning a TIFF takes one of them away
    unsigned = image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,)
    inverted = image.mode in _SIXTEEN and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image, notes = _plain(path, ImageOps.exif_transpose(image), label)
    values = np.swapaxes(np.asarray(image), 0, 1)
    if sixteen:
        values = values.astype(np.uint16)
        return (WHITE_16 - values if inverted else values), float(WHITE_16), notes
    if unsigned:
        values = values.view(np.uint32)
    return values, None if image.mode in ("I", "F") else 255.0, notes


def _check_sideways(path: Path, image: Image.Image) -> None:
    """Refuse what Pillow scrambles (11.0 to 13.0 at least): TIFF without compression that is to be turned sideways."""
    orientation = getattr(image, "tag_v2", {}).get(ExifTags.Base.Orientation)
    tiles = getattr(image, "tile", None)
    if orientation in _SIDEWAYS and tiles and tiles[0][0] == "raw":
        raise PFedSAMError(
            "E05",
            f"{path} has the EXIF orientation {orientation} and no compression, which cannot be read reliably.",
            "Save it upright.",
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
    raise PFedSAMError("E05", f"{path} is in the colour space {mode}.", "Save it as grey or RGB.")


def _without_alpha(path: Path, image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An image whose alpha channel says nothing, without it. What shows through another depends on the viewer."""
    if image.mode in ("I", *_SIXTEEN):
        # one grey value is transparent
        clear = int(np.count_nonzero(np.asarray(image) == image.info["transparency"]))
    else:
        clear = int(np.count_nonzero(np.asarray(image.convert("RGBA").getchannel("A")) < 255))
    if clear:
        raise PFedSAMError(
            "E05",
            f"{path} has an alpha channel with {clear} transparent pixel(s): what is seen there depends on the viewer.",
            "Flatten it: save it without transparency.",
        )
    if image.mode in ("I", *_SIXTEEN):
        return image, ()
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"), ()
