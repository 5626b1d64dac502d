"""The one reader: an image or label file, or a folder of DICOM slices, as values and geometry.

Everything that looks at a file of a site reads it here: `validate`, `prepare`, training and evaluation (through
`pfedsam.data.loading.ReadImaged`, which the bundles name), `personalize` and `infer`. So they agree on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pfedsam.data.picture import Picture
from pfedsam.data.suffixes import FLAT, NIFTI, SUFFIXES, is_dicom
from pfedsam.errors import ErrorCode, PFedSAMError


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
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER, f"there is no image {path}.", "Give a file or a folder of DICOM slices."
        )
    try:
        picture = _read(path, label)
    except PFedSAMError:
        raise
    # a library may raise anything for a corrupt file
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE, f"'{path}' cannot be read: {reason.rstrip('.')}.", "Export it again."
        ) from error
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
    raise PFedSAMError(
        ErrorCode.UNREADABLE_IMAGE,
        f"{path} has an unknown format.",
        f"Known: {', '.join(SUFFIXES)}, and DICOM folders.",
    )


def _check_values(picture: Picture) -> None:
    values, source = picture.values, picture.source
    if values.size == 0 or values.dtype.kind not in "buif":
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{source} holds {values.dtype}{list(values.shape)}, expected real numbers.",
            "Export it as one grey image.",
        )
    if values.dtype.kind != "f":
        return
    wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
    if wrong:
        raise PFedSAMError(
            ErrorCode.SITE_DATA,
            f"{source} holds {wrong} value(s) that are not finite (NaN or infinity).",
            "Export it again, or replace these values.",
        )
