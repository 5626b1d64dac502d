"""Results as files: shape, affine and orientation are those of the image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pfedsam.data.colours import palette
from pfedsam.data.picture import Picture
from pfedsam.data.suffixes import NIFTI, case_name
from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.files import when_whole

LABEL, PICTURE, PROBABILITY, OVERLAY, SEGMENTATION = ".nii.gz", ".png", "_probability.nii.gz", "_overlay.png", ".dcm"
#: How the label of a picture is stored: class numbers with a colour for each, or one class as 0 and 255.
PALETTE, WHITE = "palette", "white"
#: A probability of 1, and a pixel of the class, in a PNG of 16 and of 8 bits.
_WHITE_16, _WHITE_8 = 65535, 255


def stem_of(source: Path, out: Path, labels: Sequence[str]) -> Path:
    """Path of the results of an image, to which each of them adds its ending: `<out>/<case>_<labels>`."""
    # a link is named by its own name; a dot by that of its folder
    whole = source if source.name not in ("", "..") else source.resolve()
    return out / f"{case_name(whole) or whole.name}_{'_'.join(labels)}"


def check_results(
    sources: Sequence[Path], out: Path, labels: Sequence[str], force: bool = False, more: Sequence[str] = ()
) -> None:
    """Refuse images whose results would overwrite each other, an image that was given, or a file that is there.

    A file that is there may be a result that a person has corrected, so it is not replaced without being asked to.

    Args:
        sources: the images.
        out: folder for the results.
        labels: names of the classes.
        force: replace files that are there, except the images that were given.
        more: endings of the results beside the label that are asked for.

    Raises:
        PFedSAMError: E09 naming both images, E24 naming files that are there.
    """
    inputs = {source.resolve(): source for source in sources}
    seen: dict[Path, Path] = {}
    for source in sources:
        stem = stem_of(source, out, labels)
        if seen.get(stem) == source:
            raise PFedSAMError(ErrorCode.SITE_DATA, f"'{source}' is given twice.", "Give each image once.")
        if stem in seen:
            raise PFedSAMError(
                ErrorCode.SITE_DATA,
                f"'{seen[stem]}' and '{source}' would both be written to '{stem}...'.",
                "Segment them in two calls with two --out folders, or rename one.",
            )
        seen[stem] = source
        endings = (LABEL, PICTURE, PROBABILITY, *picture_probabilities(labels), OVERLAY, SEGMENTATION)
        for result in _results(stem, endings):
            if result.resolve() in inputs:
                raise PFedSAMError(
                    ErrorCode.SITE_DATA,
                    f"the result of '{source}' would overwrite the image '{inputs[result.resolve()]}'.",
                    "Choose another --out folder.",
                )
    there = [path for stem in seen for path in _results(stem, (LABEL, PICTURE, *more)) if os.path.lexists(path)]
    if there and not force:
        named = few(f"'{path}'" for path in there)
        raise PFedSAMError(
            ErrorCode.NOT_OURS,
            f"{len(there)} file(s) with the name of a result are there already: {named}.",
            "Choose another --out folder, or give --force to replace them.",
        )


def _results(stem: Path, endings: Sequence[str]) -> Iterator[Path]:
    for ending in endings:
        yield stem.with_name(stem.name + ending)


def picture_probabilities(labels: Sequence[str]) -> list[str]:
    """Endings of the probabilities of a picture: one file for each class."""
    base = PROBABILITY.removesuffix(LABEL)
    return [f"{base}{PICTURE}"] if len(labels) == 1 else [f"{base}_{name}{PICTURE}" for name in labels]


def write_label(label: NDArray[np.uint8], image: Picture, path: Path, mask: str = PALETTE) -> Path:
    """Write label values in the format of the input: NIfTI for volumes and series, PNG for pictures.

    Args:
        label: `(x, y[, z])`.
        image: what it belongs to.
        path: without suffix.
        mask: of a picture: `palette` for class numbers that a viewer shows in colours, `white` for 0 and 255 of one
            class. The reader takes both as labels.

    Returns:
        The file written.
    """
    if image.kind == "picture":
        path = path.with_name(path.name + PICTURE)
        rows = np.ascontiguousarray(np.swapaxes(label.reshape(image.shape), 0, 1))
        picture = Image.fromarray(np.where(rows > 0, _WHITE_8, 0).astype(np.uint8) if mask == WHITE else rows)
        if mask == PALETTE:
            # whole, so that it is stored in 8 bits
            picture.putpalette(palette())
        with when_whole(path) as file:
            picture.save(file)
        return path
    path = path.with_name(path.name + LABEL)
    _save_nifti(label.reshape(image.label_shape), image, path)
    return path


def write_probabilities(
    probabilities: NDArray[np.float32], image: Picture, path: Path, labels: Sequence[str]
) -> list[Path]:
    """Write probabilities `(C, x, y[, z])`.

    Of a volume one NIfTI file, the classes last; one class has no axis for it. Of a picture a PNG of 16 bits for each
    class, in which 65535 is 1.

    Args:
        probabilities: 0 to 1.
        image: what they belong to.
        path: without suffix.
        labels: names of the classes.

    Returns:
        The files written.
    """
    if image.kind == "picture":
        paths = [path.with_name(path.name + ending) for ending in picture_probabilities(labels)]
        for channel, file in zip(probabilities, paths, strict=True):
            values = np.rint(np.clip(channel.reshape(image.shape), 0, 1) * _WHITE_16).astype(np.uint16)
            with when_whole(file) as new:
                Image.fromarray(np.ascontiguousarray(np.swapaxes(values, 0, 1))).save(new)
        return paths
    path = path.with_name(path.name + PROBABILITY)
    channels = [channel.reshape(image.label_shape) for channel in probabilities]
    _save_nifti(channels[0] if len(channels) == 1 else np.stack(channels, axis=-1), image, path)
    return [path]


def _save_nifti(values: NDArray[Any], image: Picture, path: Path) -> None:
    """With the affine and its codes as in the input."""
    if image.source.is_file() and image.source.name.lower().endswith(NIFTI):
        source: Any = nibabel.load(image.source)
        header = source.header
        # in the unit of the image's header, which need not be millimetres
        out = nibabel.Nifti1Image(values, source.affine)
        for kind in ("qform", "sform"):
            form, code = getattr(header, f"get_{kind}")(coded=True)
            getattr(out, f"set_{kind}")(form if code else None, int(code))
        out.header.set_xyzt_units(*header.get_xyzt_units())
    else:
        out = nibabel.Nifti1Image(values, np.eye(4) if image.affine is None else image.affine)
    with when_whole(path) as file:
        nibabel.save(out, file)
