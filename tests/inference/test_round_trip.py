"""Whatever goes in, the label lies exactly on it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from image_files import SERIES_AFFINE, series
from PIL import Image
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.inference.predict import Predictor

SHAPE = (37, 52, 9)


def volume(shape: tuple[int, ...] = SHAPE, dtype: str = "int16") -> np.ndarray:
    """Bright, asymmetric and smooth."""
    grid = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape[:3]], indexing="ij")
    values = 80 * np.exp(-sum((one - 0.2 * n) ** 2 for n, one in enumerate(grid, 1)) * 3)
    return (values + 20 * (grid[0] > 0.3)).reshape(shape).astype(dtype)


def oblique() -> np.ndarray:
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2.0, 3.5, 5.0])
    affine[:3, 3] = (-40, 12.5, 7)
    return affine


AFFINES = {
    "RAS": np.diag([3.0, 3.0, 4.0, 1.0]),
    "LPS": np.diag([-3.0, -3.0, 4.0, 1.0]),
    "oblique, anisotropic": oblique(),
    "axes swapped": np.array([[0, 0, 3.0, 0], [3.0, 0, 0, 0], [0, -3.0, 0, 0], [0, 0, 0, 1]]),
}


def one(model: Path, path: Path, **more):
    return Predictor(model, **more)(path)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_nifti_keeps_shape_affine_and_codes(model: Path, tmp_path: Path, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(volume(), affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    nib.save(image, tmp_path / "case.nii.gz")
    out = CliRunner().invoke(
        app, ["infer", str(tmp_path / "case.nii.gz"), "--model", str(model), "--out", str(tmp_path)]
    )
    assert out.exit_code == 0, out.output
    label = nib.load(tmp_path / "case_lesion.nii.gz")
    assert label.shape == SHAPE
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-5)
    assert (label.header["sform_code"], label.header["qform_code"]) == (2, 1)
    assert 0 < np.asarray(label.dataobj).mean() < 1


@pytest.mark.parametrize("flip", [0, 1])
def test_the_same_body_in_another_storage_order_gets_the_same_label(model: Path, tmp_path: Path, flip: int) -> None:
    """The same voxels stored the other way round, with an affine that says so, are the same image."""
    # in-plane size a multiple of the network's pixels, so that the resampled grids are mirror images
    shape = (32, 64, 5)
    values, affine = volume(shape), np.diag([4.0, 4.0, 4.0, 1.0])
    turned = affine.copy()
    turned[:3, 3] += turned[:3, flip] * (shape[flip] - 1)
    turned[:3, flip] *= -1
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "one.nii.gz")
    nib.save(nib.Nifti1Image(np.flip(values, flip).copy(), turned), tmp_path / "two.nii.gz")
    first, second = (one(model, tmp_path / f"{name}.nii.gz").probabilities for name in ("one", "two"))
    np.testing.assert_allclose(first, np.flip(second, flip + 1), atol=1e-4)


SHAPES = {"2-D": SHAPE[:2], "one slice": (*SHAPE[:2], 1), "4-D with one channel": (*SHAPE, 1)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_other_shapes_come_back_in_their_shape(model: Path, tmp_path: Path, shape: tuple, dtype: str) -> None:
    size = shape + (1,) * (3 - len(shape))
    values = volume(size[:3], dtype).reshape(shape)
    nib.save(nib.Nifti1Image(values, np.diag([3.0, 3, 3, 1])), tmp_path / "case.nii")
    nib.save(nib.Nifti1Image(values.reshape(size[:3]), np.diag([3.0, 3, 3, 1])), tmp_path / "plain.nii")
    runner = CliRunner().invoke(
        app, ["infer", str(tmp_path / "case.nii"), "--model", str(model), "--out", str(tmp_path)]
    )
    assert runner.exit_code == 0, runner.output
    label = nib.load(tmp_path / "case_lesion.nii.gz")
    assert label.shape == shape
    plain = one(model, tmp_path / "plain.nii").label()
    np.testing.assert_array_equal(np.asarray(label.dataobj).reshape(plain.shape), plain)


def test_png_and_nifti_of_the_same_array_give_the_same_label(model: Path, tmp_path: Path) -> None:
    values = volume((48, 40, 1), "uint8")
    Image.fromarray(values[..., 0].T).save(tmp_path / "picture.png")
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "volume.nii.gz")
    files = [str(tmp_path / name) for name in ("picture.png", "volume.nii.gz")]
    out = CliRunner().invoke(app, ["infer", *files, "--model", str(model), "--out", str(tmp_path / "out")])
    assert f"{model}: " in out.output and "current state of round 3" in out.output
    assert out.exit_code == 0, out.output
    picture = np.asarray(Image.open(tmp_path / "out" / "picture_lesion.png")).T
    nifti = np.asarray(nib.load(tmp_path / "out" / "volume_lesion.nii.gz").dataobj)[..., 0]
    assert picture.shape == (48, 40)
    np.testing.assert_array_equal(picture, nifti)


def test_experts_are_off_with_global(model: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(volume(), np.diag([3.0, 3, 3, 1])), tmp_path / "case.nii")
    personal, shared = (one(model, tmp_path / "case.nii", experts=on).probabilities for on in (True, False))
    assert np.abs(personal - shared).max() > 1e-3


def test_probabilities_and_overlay(model: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(volume(), np.diag([3.0, 3, 3, 1])), tmp_path / "case.nii")
    line = ["infer", str(tmp_path / "case.nii"), "--model", str(model), "--out", str(tmp_path), "--probabilities"]
    out = CliRunner().invoke(app, [*line, "--overlay"])
    assert out.exit_code == 0, out.output
    probabilities = np.asarray(nib.load(tmp_path / "case_lesion_probability.nii.gz").dataobj)
    label = np.asarray(nib.load(tmp_path / "case_lesion.nii.gz").dataobj)
    np.testing.assert_array_equal(label, probabilities > 0.5)
    assert Image.open(tmp_path / "case_lesion_overlay.png").size[0] > 100


# ---- DICOM --------------------------------------------------------------------------------------------------------


def test_dicom_series_and_its_nifti_give_the_same_label(model: Path, tmp_path: Path) -> None:
    values, affine = volume(), SERIES_AFFINE

    def scale(data: pydicom.Dataset, z: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = 2, -10

    series(tmp_path / "series", values, edit=scale)
    nib.save(nib.Nifti1Image(values * 2.0 - 10, affine), tmp_path / "same.nii.gz")
    line = [
        str(tmp_path / "series"),
        str(tmp_path / "same.nii.gz"),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "out"),
    ]
    out = CliRunner().invoke(app, ["infer", *line, "--dicom-seg"])
    assert out.exit_code == 0, out.output
    first, second = (nib.load(tmp_path / "out" / f"{name}_lesion.nii.gz") for name in ("series", "same"))
    np.testing.assert_allclose(first.affine, affine, atol=1e-5)
    label = np.asarray(first.dataobj)
    np.testing.assert_array_equal(label, np.asarray(second.dataobj))
    assert label.any()
    seg = pydicom.dcmread(tmp_path / "out" / "series_lesion.dcm")
    assert seg.Modality == "SEG"
    assert seg.SegmentSequence[0].SegmentLabel == "lesion"
    assert seg.pixel_array.shape == (SHAPE[2], SHAPE[1], SHAPE[0])
    positions = [
        float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in seg.PerFrameFunctionalGroupsSequence
    ]
    order = np.argsort(positions)
    np.testing.assert_array_equal(seg.pixel_array[order], np.transpose(label, (2, 1, 0)))
