"""Several images in one call: each has its own result or its own reason, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from image_files import SERIES_AFFINE, dicom_slice, enhanced, head, nifti, save_dicom, series
from PIL import Image
from pydicom.uid import generate_uid
from typer.testing import CliRunner, Result

from pfedsam.cli import app
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError
from pfedsam.inference.segmentation import TYPE_1, TYPE_2, write_segmentation
from pfedsam.inference.writers import check_results, stem_of

VALUES = head((32, 28, 5))
GREY = np.ascontiguousarray(head((32, 28, 1))[..., 0].T.astype(np.uint8))


def infer(model: Path, out: Path, *images: Path, extra: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(app, ["infer", *map(str, images), "--model", str(model), "--out", str(out), *extra])


def test_images_of_one_name_are_refused_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    for folder, name in (("a", "scan.png"), ("b", "scan.tif")):
        (tmp_path / folder).mkdir()
        Image.fromarray(GREY).save(tmp_path / folder / name)
    done = infer(model, tmp_path / "out", tmp_path / "a" / "scan.png", tmp_path / "b" / "scan.tif")
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E09"
    for word in ("a/scan.png", "b/scan.tif", "--out"):
        assert word in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_result_never_overwrites_an_image_that_was_given(tmp_path: Path) -> None:
    first, second = tmp_path / "x.nii.gz", tmp_path / "x_lesion.nii.gz"
    check_results([first, second], tmp_path / "out", ["lesion"])
    with pytest.raises(PFedSAMError, match=r"E09.*x\.nii\.gz' would overwrite the image '.*x_lesion\.nii\.gz'"):
        check_results([first, second], tmp_path, ["lesion"])
    with pytest.raises(PFedSAMError, match=r"E09.*given twice"):
        check_results([first, Path(str(first))], tmp_path / "out", ["lesion"])


def test_a_result_that_is_there_is_replaced_by_force_only(model: Path, tmp_path: Path) -> None:
    """A person may have corrected it. Nothing is computed, and no other image is done either."""
    scans = [nifti(tmp_path / f"scan{n}.nii.gz", VALUES + n) for n in range(2)]
    corrected = tmp_path / "scan1_lesion.nii.gz"
    corrected.write_bytes(b"corrected by hand")
    done = infer(model, tmp_path, *scans)
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"
    assert str(corrected) in str(done.exception) and "--force" in str(done.exception)
    assert corrected.read_bytes() == b"corrected by hand" and not (tmp_path / "scan0_lesion.nii.gz").exists()
    done = infer(model, tmp_path, *scans, extra=("--force",))
    assert done.exit_code == 0 and nibabel.load(corrected).shape == VALUES.shape
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("there", ["x_lesion_overlay.png", "x_lesion_probability.nii.gz", "x_lesion.dcm"])
def test_a_file_in_the_place_of_a_result_is_in_the_way_where_that_result_is_asked_for(
    tmp_path: Path, there: str
) -> None:
    image, ending = tmp_path / "x.nii.gz", there.removeprefix("x_lesion")
    (tmp_path / there).symlink_to("nothing")
    check_results([image], tmp_path, ["lesion"])
    with pytest.raises(PFedSAMError, match=rf"E24.*{there}"):
        check_results([image], tmp_path, ["lesion"], more=[ending])
    check_results([image], tmp_path, ["lesion"], True, [ending])


def test_force_does_not_let_a_result_overwrite_an_image_that_was_given(tmp_path: Path) -> None:
    first, second = tmp_path / "x.nii.gz", tmp_path / "x_lesion.nii.gz"
    with pytest.raises(PFedSAMError, match="E09"):
        check_results([first, second], tmp_path, ["lesion"], force=True)


@pytest.mark.parametrize("name", ["patient7.nii.gz", "1.2.840.7"])
def test_a_result_has_the_name_that_was_given(tmp_path: Path, name: str) -> None:
    """Not that of a link's target, and all of a file without suffix that is named by a UID."""
    (tmp_path / "MD5-abc.nii.gz").touch()
    (tmp_path / name).symlink_to(tmp_path / "MD5-abc.nii.gz")
    expected = tmp_path / "out" / f"{name.removesuffix('.nii.gz')}_lesion"
    assert stem_of(tmp_path / name, tmp_path / "out", ["lesion"]) == expected


def test_a_folder_is_named_by_its_last_part_also_where_it_is_given_as_a_dot(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(series(tmp_path / "1.2.840.7", VALUES))
    done = infer(model, tmp_path / "out", Path("."))
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.2.840.7_lesion.nii.gz"]


def test_what_cannot_be_read_is_named_and_the_others_are_done(model: Path, tmp_path: Path) -> None:
    good = [nifti(tmp_path / f"good{n}.nii.gz", VALUES + n) for n in range(2)]
    holed = VALUES.astype(np.float32)
    holed[0, 0, 0] = np.nan
    bad = nifti(tmp_path / "bad.nii.gz", holed)
    missing = tmp_path / "missing.png"
    done = infer(model, tmp_path / "out", good[0], bad, missing, good[1])
    assert done.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "good0_lesion.nii.gz",
        "good1_lesion.nii.gz",
    ]
    told = done.output.split("2 of 4 images failed:")[1]
    assert f"{bad}: E09" in told and "not finite" in told and f"{missing}: E02" in told and "good" not in told


def test_an_error_while_a_result_is_written_belongs_to_its_image(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        series(tmp_path / name, VALUES)

    def fail_once(label: np.ndarray, source: Path, *more: object) -> Path:
        if source.name == "a":
            raise OSError("no space left on device")
        return write_segmentation(label, source, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("pfedsam.inference.segmentation.write_segmentation", fail_once)
    done = infer(model, tmp_path / "out", tmp_path / "a", tmp_path / "b", extra=("--dicom-seg",))
    assert done.exit_code == 1 and (tmp_path / "out" / "b_lesion.dcm").exists()
    told = done.output.split("1 of 2 images failed:")[1]
    assert "no space left" in told and str(tmp_path / "a") in told and str(tmp_path / "b") not in told


def test_what_was_done_to_an_image_and_what_is_not_seen_is_said(model: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    large = nifti(tmp_path / "large.nii.gz", head((128, 128, 2)), np.diag([4.0, 4.0, 5.0, 1.0]))
    one = np.full((32, 28, 5), 7, np.int16)
    one[3, 3, 3] = 900
    flat = nifti(tmp_path / "flat.nii.gz", one)
    done = infer(model, tmp_path / "out", tmp_path / "turned.png", large, flat)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any("turned.png" in line and "EXIF" in line for line in lines)
    assert any("large.nii.gz: 75% of the image lies outside" in line and "256 mm" in line for line in lines)
    assert any("flat.nii.gz: nearly all of its values" in line for line in lines)


# ---- DICOM segmentation objects -----------------------------------------------------------------------------------

LABEL = (VALUES > 120).astype(np.uint8)


def test_a_series_without_thickness_has_an_object(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", VALUES, drop=["SliceThickness"])
    data = pydicom.dcmread(write_segmentation(LABEL, folder, tmp_path / "out", ["lesion"], "test"))
    np.testing.assert_array_equal(_planes(data), LABEL)


@pytest.mark.parametrize("keyword", [word for word in TYPE_2 if word != "SliceThickness"])
def test_what_an_anonymiser_took_away_is_empty_in_the_object(tmp_path: Path, keyword: str) -> None:
    folder = series(tmp_path / "s", VALUES, drop=[keyword])
    data = pydicom.dcmread(write_segmentation(LABEL, folder, tmp_path / "out", ["lesion"], "test"))
    assert keyword in data and not data[keyword].value
    np.testing.assert_array_equal(_planes(data), LABEL)


def _planes(data: pydicom.Dataset) -> np.ndarray:
    """The object's frames `(x, y, z)` in the order of their position along z."""
    groups = data.PerFrameFunctionalGroupsSequence
    order = np.argsort([float(one.PlanePositionSequence[0].ImagePositionPatient[2]) for one in groups])
    return np.transpose(data.pixel_array[order], (2, 1, 0))


@pytest.mark.parametrize("keyword", [word for word in TYPE_1 if not word.startswith("SOP")])
def test_what_must_be_there_is_named_for_every_series_before_anything_is_segmented(
    model: Path, tmp_path: Path, keyword: str
) -> None:
    bad = [series(tmp_path / name, VALUES, drop=[keyword]) for name in ("bad1", "bad2")]
    good = series(tmp_path / "good", VALUES)
    done = infer(model, tmp_path / "out", *bad, good, extra=("--dicom-seg",))
    assert isinstance(done.exception, PFedSAMError)
    text = str(done.exception)
    assert all(f"{folder} lacks {keyword} (" in text for folder in bad) and "good" not in text
    assert not (tmp_path / "out").exists()


def test_one_series_that_cannot_be_read_does_not_cost_the_others_theirs(model: Path, tmp_path: Path) -> None:
    bad = series(tmp_path / "bad", VALUES, drop=["ImagePositionPatient"])
    done = infer(model, tmp_path / "out", bad, series(tmp_path / "good", VALUES), extra=("--dicom-seg",))
    assert done.exit_code == 1 and (tmp_path / "out" / "good_lesion.dcm").exists()
    assert "ImagePositionPatient" in done.output.split("1 of 2 images failed:")[1]


def test_a_sex_that_is_none_of_dicoms_is_left_empty(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", VALUES, edit=lambda data, z: setattr(data, "PatientSex", "X"))
    assert not pydicom.dcmread(write_segmentation(LABEL, folder, tmp_path / "out", ["lesion"], "test")).PatientSex


@pytest.mark.filterwarnings("ignore:.*DS.*")
def test_an_object_of_a_tilted_series_lies_on_its_slices(tmp_path: Path) -> None:
    angle = np.deg2rad(12)
    orientation = (1, 0, 0, 0, round(float(np.cos(angle)), 12), round(float(-np.sin(angle)), 12))
    folder = series(tmp_path / "s", VALUES, orientation=orientation, step=(0, 0, 4.0))
    data = pydicom.dcmread(write_segmentation(LABEL, folder, tmp_path / "out", ["lesion"], "test"))
    np.testing.assert_array_equal(_planes(data), LABEL)


@pytest.mark.filterwarnings("ignore:.*DS.*")
def test_numbers_that_are_too_long_are_shortened_in_the_object(tmp_path: Path) -> None:
    folder = series(tmp_path / "s", VALUES)
    turn = np.cos(0.3), np.sin(0.3)
    long = f"{turn[0]:.17f}\\{turn[1]:.17f}\\0\\{-turn[1]:.17f}\\{turn[0]:.17f}\\0"
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        with pydicom.config.disable_value_validation():
            data.ImageOrientationPatient = long.split("\\")
            data.save_as(path)
    data = pydicom.dcmread(write_segmentation(LABEL, folder, tmp_path / "out", ["lesion"], "test"))
    plane = data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose([float(one) for one in plane[:2]], turn, atol=1e-12)
    assert all(len(str(one)) <= 16 for one in plane)


def test_an_object_of_frames_has_their_order(tmp_path: Path) -> None:
    path = enhanced(series(tmp_path / "s", VALUES), tmp_path / "a.dcm", shuffle=True)
    data = pydicom.dcmread(write_segmentation(LABEL, path, tmp_path / "out", ["lesion"], "test"))
    np.testing.assert_array_equal(_planes(data), LABEL)


def test_a_single_slice_is_segmented_with_its_geometry(model: Path, tmp_path: Path) -> None:
    data = dicom_slice(VALUES[..., 2], (-50, -60, -30))
    data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    path = save_dicom(tmp_path / "a.dcm", data)
    done = infer(model, tmp_path / "out", path, extra=("--dicom-seg", "--overlay"))
    assert done.exit_code == 0, done.output
    label = nibabel.load(tmp_path / "out" / "a_lesion.nii.gz")
    assert label.shape == (32, 28, 1)
    np.testing.assert_allclose(label.affine, SERIES_AFFINE)
    seg = pydicom.dcmread(tmp_path / "out" / "a_lesion.dcm")
    np.testing.assert_array_equal(seg.pixel_array.reshape(28, 32).T, np.asarray(label.dataobj)[..., 0])
    # and lies where the slice lies
    np.testing.assert_allclose(load_picture(tmp_path / "out" / "a_lesion.dcm", label=True).affine, SERIES_AFFINE)
