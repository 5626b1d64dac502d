"""An image or label file as values and geometry, without any transform."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Suffixes of NIfTI files, in lower case.
NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Picture:
    """One loaded file: the values, and what its header says of space (None and "" where it says nothing)."""

    values: NDArray[Any]
    shape: tuple[int, ...]
    affine: NDArray[Any] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str = ""


def load_picture(path: Path) -> Picture:
    """Load an image or label file, or a folder of DICOM slices, with the axes that MONAI's `LoadImage` gives.

    Returns:
        Values (x, y[, slice][, channel]) and geometry.

    Raises:
        Exception: whatever the reader raises for a file that it cannot read.
    """
    if path.name.lower().endswith(NIFTI):
        import nibabel

        nifti = nibabel.load(path)
        assert isinstance(nifti, (nibabel.Nifti1Image, nibabel.Nifti2Image))
        values, affine = np.asanyarray(nifti.dataobj), nifti.affine
        return _with_affine(values, affine) if affine is not None else Picture(values, values.shape[:3])
    if path.is_dir() or path.suffix.lower() == ".dcm":
        from monai.data.image_reader import PydicomReader

        reader = PydicomReader()
        values, meta = reader.get_data(reader.read(path))
        # the reader leaves out what it cannot use, without an error
        files = len(list(visible(path))) if path.is_dir() else 1
        slices = values.shape[2] if path.is_dir() and values.ndim > 2 else 1
        if slices != files:
            raise ValueError(f"only {slices} of its {files} files are DICOM slices with a number")
        return _with_affine(values, np.asarray(meta["affine"], dtype=float))
    from PIL import Image

    with Image.open(path) as image:
        values = np.swapaxes(np.asarray(image), 0, 1)
    return Picture(values, values.shape[:2])


def _with_affine(values: NDArray[Any], affine: NDArray[Any]) -> Picture:
    import nibabel

    shape = values.shape[:3]
    spacing = tuple(float(step) for step in np.linalg.norm(affine[:3, :3], axis=0))[: len(shape)]
    codes = nibabel.orientations.aff2axcodes(affine)
    return Picture(values, shape, affine, spacing, "".join(code or "?" for code in codes))


def plane(values: NDArray[Any], z: int) -> NDArray[Any]:
    """What to show of an image: a slice `(x, y)` of a volume, or a picture `(x, y[, 3])` as it is."""
    if values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4) and values.dtype == np.uint8):
        return values[..., :3] if values.ndim == 3 else values
    return values.reshape(values.shape[:3])[..., z]


def visible(folder: Path) -> Iterator[Path]:
    """The files of a folder in order, without hidden ones; none if it is no folder."""
    if folder.is_dir():
        yield from (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
