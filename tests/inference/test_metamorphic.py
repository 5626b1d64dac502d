"""One array in every format that can hold it: the reader gives one array and one affine, the model one answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from image_files import SERIES_AFFINE, enhanced, head, nifti, scaled_nifti, series
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from pfedsam.data.loading import ReadImaged
from pfedsam.data.reader import load_picture
from pfedsam.inference.predict import Predictor

VALUES = head((32, 28, 6))
#: The middle slice alone, as a picture.
SLICE = VALUES[..., 3]


def _nifti2(path: Path) -> Path:
    nibabel.save(nibabel.Nifti2Image(VALUES, SERIES_AFFINE), path)
    return path


def _pages(path: Path) -> Path:
    pages = [Image.fromarray(np.ascontiguousarray(VALUES[..., z].T.astype(np.uint16))) for z in range(6)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def _picture(dtype: type) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        Image.fromarray(np.ascontiguousarray(SLICE.T.astype(dtype))).save(path)
        return path

    return write


VOLUMES: dict[str, Callable[[Path], Path]] = {
    "int16.nii.gz": lambda path: nifti(path, VALUES, SERIES_AFFINE),
    "float32.nii": lambda path: nifti(path, VALUES.astype(np.float32), SERIES_AFFINE),
    "scaled.nii": lambda path: scaled_nifti(path, (VALUES + 40) * np.int16(4), 0.25, -40, SERIES_AFFINE),
    "nifti2.nii": _nifti2,
    "explicit": lambda path: series(path, VALUES, syntax=ExplicitVRLittleEndian),
    "rle": lambda path: series(path, VALUES, syntax=RLELossless),
    "jpegls": lambda path: series(path, VALUES, syntax=JPEGLSLossless),
    "frames.dcm": lambda path: enhanced(series(path.with_suffix(""), VALUES), path, shuffle=True),
}
STACKS: dict[str, Callable[[Path], Path]] = {
    "stack.nii": lambda path: nifti(path, VALUES),
    "pages.tif": _pages,
}
PICTURES: dict[str, Callable[[Path], Path]] = {
    "picture.nii": lambda path: nifti(path, VALUES[..., 3:4]),
    "flat.nii": lambda path: nifti(path, SLICE),
    "png8.png": _picture(np.uint8),
    "png16.png": _picture(np.uint16),
    "tif8.tif": _picture(np.uint8),
    "tif16.tiff": _picture(np.uint16),
    "float.tif": _picture(np.float32),
    "signed.tif": _picture(np.int32),
}


@pytest.mark.parametrize(
    ("kinds", "expected", "affine"),
    [(VOLUMES, VALUES, SERIES_AFFINE), (STACKS, VALUES, np.eye(4)), (PICTURES, VALUES[..., 3:4], np.eye(4))],
    ids=["volumes", "stacks", "pictures"],
)
def test_one_array_one_answer(
    model: Path,
    tmp_path: Path,
    kinds: dict[str, Callable[[Path], Path]],
    expected: np.ndarray,
    affine: np.ndarray,
) -> None:
    predictor, answers = Predictor(model), {}
    for name, write in kinds.items():
        path = write(tmp_path / name)
        read = load_picture(path)
        np.testing.assert_array_equal(read.values.reshape(expected.shape), expected, err_msg=name)
        if read.affine is not None:
            np.testing.assert_allclose(read.affine, affine, atol=1e-6, err_msg=name)
        # what training gets of it
        loaded = ReadImaged("image")({"image": str(path)})["image"]
        np.testing.assert_array_equal(loaded[0], expected, err_msg=name)
        np.testing.assert_allclose(loaded.affine, affine, atol=1e-6, err_msg=name)
        answers[name] = predictor(path).probabilities.reshape(-1, *expected.shape)
    first, *others = answers
    assert np.ptp(answers[first]) > 0.01
    for name in others:
        np.testing.assert_allclose(answers[name], answers[first], atol=1e-5, err_msg=name)
