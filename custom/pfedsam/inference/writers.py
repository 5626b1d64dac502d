"""Results as files: shape, affine and orientation are those of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pfedsam.data.pictures import Picture
from pfedsam.data.suffixes import NIFTI, case_name
from pfedsam.errors import PFedSAMError

LABEL, PICTURE, PROBABILITY, OVERLAY, SEGMENTATION = ".nii.gz", ".png", "_probability.nii.gz", "_overlay.png", ".dcm"


def stem_of(source: Path, out: Path, labels: Sequence[str]) -> Path:
    """Path of the results of an image, to which each of them adds its ending: `<out>/<case>_<labels>`."""
    # a link is named by its own name; a dot by that of its folder
    whole = source if source.name not in ("", "..") else source.resolve()
    return out / f"{case_name(whole) or whole.name}_{'_'.join(labels)}"


def check_results(sources: Sequence[Path], out: Path, labels: Sequence[str]) -> None:
    """Refuse images whose results would overwrite each other, or an image that was given.

    Raises:
        PFedSAMError: E09 naming both.
    """
    inputs = {source.resolve(): source for source in sources}
    seen: dict[Path, Path] = {}
    for source in sources:
        stem = stem_of(source, out, labels)
        if seen.get(stem) == source:
            raise PFedSAMError("E09", f"'{source}' is given twice.", "Give each image once.")
        if stem in seen:
            raise PFedSAMError(
                "E09",
                f"'{seen[stem]}' and '{source}' would both be written to '{stem}...'.",
                "Segment them in two calls with two --out folders, or rename one.",
            )
        seen[stem] = source
        for result in _all_results(stem):
            if result.resolve() in inputs:
                raise PFedSAMError(
                    "E09",
                    f"the result of '{source}' would overwrite the image '{inputs[result.resolve()]}'.",
                    "Choose another --out folder.",
                )


def _all_results(stem: Path) -> Iterator[Path]:
    for ending in (LABEL, PICTURE, PROBABILITY, OVERLAY, SEGMENTATION):
        yield stem.with_name(stem.name + ending)


def write_label(label: NDArray[np.uint8], image: Picture, path: Path) -> Path:
    """Write label values in the format of the input: NIfTI for volumes and series, PNG for pictures.

    Args:
        label: `(x, y[, z])`.
        image: what it belongs to.
        path: without suffix.

    Returns:
        The file written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.kind == "picture":
        path = path.with_name(path.name + PICTURE)
        Image.fromarray(np.swapaxes(label.reshape(image.shape), 0, 1)).save(path)
        return path
    path = path.with_name(path.name + LABEL)
    _save_nifti(label.reshape(image.label_shape), image, path)
    return path


def write_probabilities(probabilities: NDArray[np.float32], image: Picture, path: Path) -> Path:
    """Write probabilities `(C, x, y[, z])` as NIfTI, the classes last; one class has no axis for it."""
    path = path.with_name(path.name + PROBABILITY)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [one.reshape(image.label_shape) for one in probabilities]
    _save_nifti(values[0] if len(values) == 1 else np.stack(values, axis=-1), image, path)
    return path


def _save_nifti(values: NDArray[Any], image: Picture, path: Path) -> None:
    """With the affine and its codes as in the input."""
    if not (image.source.is_file() and image.source.name.lower().endswith(NIFTI)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if image.affine is None else image.affine), path)
        return
    source: Any = nibabel.load(image.source)
    header = source.header
    # in the unit of the image's header, which need not be millimetres
    out = nibabel.Nifti1Image(values, source.affine)
    for kind in ("qform", "sform"):
        form, code = getattr(header, f"get_{kind}")(coded=True)
        getattr(out, f"set_{kind}")(form if code else None, int(code))
    out.header.set_xyzt_units(*header.get_xyzt_units())
    nibabel.save(out, path)
