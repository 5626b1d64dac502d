"""The one reader: an image or label file, or a folder of DICOM slices, as values and geometry.

Everything that looks at a file of a site reads it here: `validate`, `prepare`, training and evaluation (through
`pfedsam.data.loading.ReadImaged`, which the bundles name), `personalize` and `infer`. So they agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.suffixes import FLAT, NIFTI, SUFFIXES, is_dicom
from pfedsam.errors import PFedSAMError

Kind = Literal["volume", "picture"]


@dataclass(frozen=True)
class Picture:
    """One file that was read.

    Attributes:
        values: numbers as the file means them (scaled, in the unit of the modality): `(x, y, z)` of a volume,
            `(x, y)` of a grey picture, `(x, y, 3)` of a colour picture (8 bits). All are finite.
        kind: `volume` (NIfTI, DICOM, TIFF of several pages) or `picture`.
        source: the file, or the folder of a DICOM series.
        affine: voxel indices to millimetres, right, anterior, superior; None where the file says nothing of space.
        stored_shape: of the values in the file, where it differs: a label is written in it.
        white: the value of white in a picture, None if its format has none (32-bit integers, floating point).
        notes: what a person should know of how it was read, in sentences.
    """

    values: NDArray[Any]
    kind: Kind
    source: Path
    affine: NDArray[np.float64] | None = None
    stored_shape: tuple[int, ...] = ()
    white: float | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def channels(self) -> int:
        """1, or 3 for colour."""
        return self.values.shape[-1] if self.is_colour else 1

    @property
    def is_colour(self) -> bool:
        """Whether it is a colour picture."""
        return self.kind == "picture" and self.values.ndim == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels or pixels along each axis, without channels."""
        return self.values.shape[:2] if self.kind == "picture" else self.values.shape

    @property
    def volume_shape(self) -> tuple[int, ...]:
        """Shape as a volume: a picture is one slice."""
        return self.shape + (1,) * (3 - len(self.shape))

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of a label that lies on it in its own format."""
        return self.stored_shape or self.shape

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Millimetres between neighbours along each axis."""
        return None if self.affine is None else tuple(float(n) for n in np.linalg.norm(self.affine[:3, :3], axis=0))

    def grey(self) -> NDArray[Any]:
        """Values of one channel; colours by their luma (ITU-R BT.601), as Pillow has it."""
        if not self.is_colour:
            return self.values
        from PIL import Image

        return np.asarray(Image.fromarray(np.ascontiguousarray(self.values)).convert("L"))

    def plane(self, z: int) -> NDArray[Any]:
        """What to show: a slice `(x, y)` of a volume, or the picture `(x, y[, 3])` as it is."""
        return self.values if self.kind == "picture" else self.values[..., z]

    def rows(self, plane: NDArray[Any]) -> NDArray[Any]:
        """A plane `(x, y[, 3])` in its grid as rows from top to bottom: y of a picture points down, of a volume up."""
        return np.swapaxes(plane, 0, 1) if self.kind == "picture" else np.rot90(plane)

    @property
    def orientation(self) -> str:
        """Where each axis points, as "RAS"; "" where the file says nothing of space."""
        if self.affine is None:
            return ""
        from nibabel.orientations import aff2axcodes

        return "".join(str(code) for code in aff2axcodes(self.affine))


def load_picture(path: Path, label: bool = False) -> Picture:
    """Read a file, or a folder that holds one DICOM series.

    Args:
        path: in a format of `pfedsam.data.suffixes`; a DICOM file needs no suffix.
        label: whether it is a label: a palette's indices are its values, not its colours, and the values are whole
            numbers (see `pfedsam.data.labels.whole_numbers`).

    Raises:
        PFedSAMError: E02 if it is not there; E05 naming the file and what is wrong for what cannot be read, E09 for
            values that are not finite; E07 for a label that holds no whole numbers, or several channels.
    """
    if not path.exists():
        raise PFedSAMError("E02", f"there is no image {path}.", "Give a file or a folder of DICOM slices.")
    try:
        picture = _read(path, label)
    except PFedSAMError:
        raise
    # a library may raise anything for a corrupt file
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise PFedSAMError("E05", f"'{path}' cannot be read: {reason.rstrip('.')}.", "Export it again.") from error
    _check_values(picture)
    if label:
        from pfedsam.data.labels import as_label

        picture = as_label(picture)
    return picture


def _read(path: Path, label: bool) -> Picture:
    # each format imports its own library
    name = path.name.lower()
    if not path.is_dir() and name.endswith(NIFTI):
        from pfedsam.data.formats import nifti

        return nifti.read(path)
    if not path.is_dir() and name.endswith(FLAT):
        from pfedsam.data.formats import flat

        return flat.read(path, label)
    if path.is_dir() or is_dicom(path):
        from pfedsam.data.formats import dicom

        return dicom.read(path, label)
    raise PFedSAMError("E05", f"{path} has an unknown format.", f"Known: {', '.join(SUFFIXES)}, and DICOM folders.")


def _check_values(picture: Picture) -> None:
    values, source = picture.values, picture.source
    if values.size == 0 or values.dtype.kind not in "buif":
        raise PFedSAMError(
            "E05",
            f"{source} holds {values.dtype}{list(values.shape)}, expected real numbers.",
            "Export it as one grey image.",
        )
    if values.dtype.kind != "f":
        return
    wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
    if wrong:
        raise PFedSAMError(
            "E09",
            f"{source} holds {wrong} value(s) that are not finite (NaN or infinity).",
            "Export it again, or replace these values.",
        )
