"""pydicom's and nibabel's own test files, all of them: an array equal to the library's own, or an error of ours."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom import data as pydicom_data
from pydicom.pixels import apply_modality_lut
from rich.console import Console
from rich.table import Table

from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError

PYDICOM = Path(pydicom_data.__file__).parent
NIBABEL = Path(nibabel.__file__).parent


def library_files() -> Iterator[Path]:
    """The files that the packages ship for their own tests, and the folders among pydicom's that may be series."""
    for folder in ("test_files", "charset_files"):
        yield from (path for path in sorted((PYDICOM / folder).rglob("*")) if path.is_file() or _is_flat(path))
    for path in sorted(NIBABEL.rglob("*")):
        if path.is_file() and "data" in path.parts and path.suffix not in (".py", ".pyc"):
            yield path


def _is_flat(folder: Path) -> bool:
    return any(folder.iterdir()) and all(path.is_file() for path in folder.iterdir())


def own_array(path: Path) -> np.ndarray:
    """What the library of the format makes of a file of one frame, or of a volume, as `(x, y, z)`."""
    if path.name.endswith((".nii", ".nii.gz")):
        values = np.asanyarray(nibabel.load(path).dataobj)
        return values.reshape(values.shape[:3] + (1,) * (3 - values.ndim))
    slices = [pydicom.dcmread(one) for one in (path.iterdir() if path.is_dir() else [path])]
    row, column = np.asarray(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    slices.sort(key=lambda one: np.dot(np.cross(row, column), np.asarray(one.ImagePositionPatient, dtype=float)))
    return np.stack([apply_modality_lut(one.pixel_array, one).T for one in slices], axis=-1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_file_is_read_as_its_library_reads_it_or_refused_by_name() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for path in library_files():
        package = "pydicom" if PYDICOM in path.parents else "nibabel"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = load_picture(path)
            except PFedSAMError as error:
                text = str(error)
                assert str(path) in text and "\n" not in text, text
                # whatever else is named is part of what was given
                assert text.count(str(path.parent) + "/") == text.count(str(path)), text
                counts[package, error.message.replace(str(path), "").strip(" '/")[:24].split(" (")[0]] += 1
                continue
            expected = own_array(path)
        np.testing.assert_allclose(found.values, expected, rtol=1e-6, err_msg=str(path))
        counts[package, "READ, equal to the library's array"] += 1
    table = Table("package", "files", "what came of them (the first words of the error)")
    for (package, what), number in sorted(counts.items(), key=lambda one: (one[0][0], -one[1])):
        table.add_row(package, str(number), what)
    Console(width=100).print(table)
    assert sum(counts.values()) > 250
    assert counts["pydicom", "READ, equal to the library's array"] >= 40
    assert counts["nibabel", "READ, equal to the library's array"] >= 3
