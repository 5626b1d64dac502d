"""X-rays and ultrasound in DICOM, which lie nowhere in space, are pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from image_files import dicom_slice, head, save_dicom, x_ray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1, JPEGLSLossless, RLELossless, generate_uid

from pfedsam.data.case_checks import check_case
from pfedsam.data.checks import check_site
from pfedsam.data.loading import ReadImaged
from pfedsam.data.reader import load_picture
from pfedsam.data.site_folder import Case
from pfedsam.data.site_report import CaseRow, SiteReport
from pfedsam.data.splitting import write_datalist
from pfedsam.errors import PFedSAMError
from pfedsam.inference.segmentation import check_series
from pfedsam.inference.writers import write_label

#: 12 bits, `(x, y)`.
VALUES = (head((40, 30, 1))[..., 0].astype(np.uint16) * 16).clip(0, 4095)


def written(path: Path, values: np.ndarray = VALUES, **how: Any) -> Path:
    return save_dicom(path, x_ray(values, **how))


def refused(path: Path, *words: str, code: str = "E05", label: bool = False) -> None:
    with pytest.raises(PFedSAMError) as caught:
        load_picture(path, label)
    assert caught.value.code == code and all(word.lower() in str(caught.value).lower() for word in words), caught.value


@pytest.mark.parametrize("modality", ["CR", "DX", "XA", "MG", "US"])
def test_a_projection_is_a_grey_picture_with_the_size_of_its_pixels(tmp_path: Path, modality: str) -> None:
    found = load_picture(written(tmp_path / "a.dcm", modality=modality))
    assert (found.kind, found.affine, found.channels) == ("picture", None, 1)
    np.testing.assert_array_equal(found.values, VALUES)
    # stored as rows, then columns
    assert found.spacing == (0.2, 0.14) and found.white == 4095 and not found.notes


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_pixels_are_the_same(tmp_path: Path, syntax: Any) -> None:
    found = load_picture(save_dicom(tmp_path / "IM0001", x_ray(VALUES), syntax))
    np.testing.assert_array_equal(found.values, VALUES)


def test_pixels_that_no_decoder_reads_are_refused_with_what_to_do(tmp_path: Path) -> None:
    data = x_ray(VALUES)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    data["PixelData"].VR = "OB"
    pydicom.dcmwrite(tmp_path / "a.dcm", data, enforce_file_format=True)
    refused(tmp_path / "a.dcm", "a.dcm", "JPEG Lossless", "uncompressed")


def test_where_white_comes_first_values_are_turned(tmp_path: Path) -> None:
    found = load_picture(written(tmp_path / "a.dcm", 4095 - VALUES, photometric="MONOCHROME1"))
    np.testing.assert_array_equal(found.values, VALUES)
    assert found.white == 4095


@pytest.mark.parametrize(
    ("slope", "intercept", "white"), [(2.0, -1000.0, 8190.0), (0.5, 0.0, 2047.5), (-1.0, 4095.0, 4095.0)]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_rescaled_values_are_counted_from_black(
    tmp_path: Path, slope: float, intercept: float, white: float, photometric: str
) -> None:
    data = x_ray(VALUES, photometric=photometric)
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = slope, intercept, "US"
    found = load_picture(save_dicom(tmp_path / "a.dcm", data))
    ends = sorted((intercept, slope * 4095 + intercept))
    scaled = VALUES * slope + intercept
    np.testing.assert_allclose(found.values, ends[1] - scaled if photometric == "MONOCHROME1" else scaled - ends[0])
    assert found.white == white


@pytest.mark.parametrize(("bits", "signed"), [(8, False), (10, False), (16, False), (12, True), (16, True)])
def test_black_and_white_are_those_of_the_bits_that_are_stored(tmp_path: Path, bits: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.array([[low, low + 1], [low + 2, low + 2**bits - 1]])
    found = load_picture(written(tmp_path / "a.dcm", values, bits=bits, signed=signed))
    np.testing.assert_array_equal(found.values, values - low)
    assert found.white == 2**bits - 1 and found.values.dtype == (np.uint8 if bits == 8 else np.uint16)


def test_a_look_up_table_is_applied(tmp_path: Path) -> None:
    data, item = x_ray(VALUES), Dataset()
    # the last entry goes on for all larger values
    item.LUTDescriptor, item.ModalityLUTType = [3, 0, 8], "US"
    item.add_new("LUTData", "OW", np.array([10, 200, 90], dtype="<u2").tobytes())
    data.ModalityLUTSequence = [item]
    found = load_picture(save_dicom(tmp_path / "a.dcm", data))
    np.testing.assert_array_equal(found.values, np.array([10, 200, 90])[np.minimum(VALUES, 2)])
    assert found.white == 255


def test_an_overlay_above_the_stored_bits_is_no_part_of_the_values(tmp_path: Path) -> None:
    data = x_ray(VALUES)
    data.PixelData = (np.ascontiguousarray(VALUES.T) | 0x1000).astype("<u2").tobytes()
    found = load_picture(save_dicom(tmp_path / "a.dcm", data))
    np.testing.assert_array_equal(found.values, VALUES)


def test_padding_is_black_also_where_white_comes_first(tmp_path: Path) -> None:
    stored = VALUES.copy()
    stored[:5] = 7
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        data = x_ray(stored, photometric=photometric)
        data.add_new("PixelPaddingValue", "US", 5)
        data.add_new("PixelPaddingRangeLimit", "US", 7)
        found = load_picture(save_dicom(tmp_path / f"{photometric}.dcm", data))
        assert not found.values[:5].any() and found.values[5:].any()


@pytest.mark.parametrize(
    ("sizes", "spacing", "words"),
    [
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.1, 0.3]}, (0.3, 0.1), "at the detector"),
        ({"PixelSpacing": [0.5, 0.5], "ImagerPixelSpacing": [0.6, 0.6]}, (0.5, 0.5), ""),
        ({"PixelSpacing": None}, None, ""),
        ({"PixelSpacing": [0, 0]}, None, "distances are in pixels"),
    ],
)
def test_the_best_size_of_pixels_that_is_there_counts(
    tmp_path: Path, sizes: dict[str, Any], spacing: Sequence[float] | None, words: str
) -> None:
    data = x_ray(VALUES)
    for keyword, value in sizes.items():
        setattr(data, keyword, value)
    found = load_picture(save_dicom(tmp_path / "a.dcm", data))
    assert found.spacing == spacing
    assert words in "".join(found.notes) and bool(words) == bool(found.notes)


def test_a_folder_of_one_picture_is_that_picture_and_of_several_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "p1"
    written(folder / "1.dcm")
    np.testing.assert_array_equal(load_picture(folder).values, VALUES)
    written(folder / "2.dcm")
    refused(folder, "2 files", "CR", "case of its own")


def test_what_has_a_place_or_is_no_x_ray_stays_a_volume_or_is_refused(tmp_path: Path) -> None:
    placed = x_ray(VALUES, modality="US")
    placed.ImagePositionPatient, placed.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    assert load_picture(save_dicom(tmp_path / "placed.dcm", placed)).kind == "volume"
    half = x_ray(VALUES)
    half.ImagePositionPatient = [0, 0, 0]
    refused(save_dicom(tmp_path / "half.dcm", half), "ImageOrientationPatient")
    slice_ = dicom_slice(head((8, 6, 1))[..., 0], (0, 0, 0))
    slice_.SeriesInstanceUID = generate_uid()
    del slice_.ImagePositionPatient, slice_.ImageOrientationPatient
    refused(save_dicom(tmp_path / "ct.dcm", slice_), "ImageOrientationPatient")


def test_a_label_keeps_its_numbers(tmp_path: Path) -> None:
    label = (VALUES > 2000).astype(np.uint16) * 2
    found = load_picture(written(tmp_path / "l.dcm", label), label=True)
    np.testing.assert_array_equal(found.values, label)
    refused(written(tmp_path / "w.dcm", label, photometric="MONOCHROME1"), "0 is white", code="E07", label=True)


def test_a_bundle_for_pictures_gets_three_channels_and_millimetres(tmp_path: Path) -> None:
    image, label = written(tmp_path / "a.dcm"), tmp_path / "a.png"
    Image.fromarray((VALUES.T > 2000).astype(np.uint8)).save(label)
    read = ReadImaged(("image", "label"), labels="label", colour=True)({"image": image, "label": label})
    assert tuple(read["image"].shape) == (3, 40, 30)
    np.testing.assert_allclose(read["image"][0].numpy(), VALUES * (255 / 4095), rtol=1e-5)
    for one in read.values():
        np.testing.assert_allclose(one.affine.numpy(), np.diag([0.2, 0.14, 1, 1]))


def test_a_site_of_x_rays_can_train(tmp_path: Path) -> None:
    for number in range(6):
        values = np.roll(VALUES, 3 * number, axis=0)
        # as archives export them
        name = ["IM00000{}", "1.2.840.{}", "c{}.dcm"][number % 3].format(number)
        written(tmp_path / "images" / name, values)
        (tmp_path / "labels").mkdir(exist_ok=True)
        mask = Image.fromarray((values.T > 2000).astype(np.uint8))
        mask.save(tmp_path / "labels" / f"{name.removesuffix('.dcm')}.png")
    shutil.copy(tmp_path / "images" / "IM000000", tmp_path / "images" / "DICOMDIR")
    write_datalist(tmp_path)
    report = check_site(tmp_path, (0, 1), colour=True)
    assert report.ok and len(report.cases) == 6, report.findings
    assert any("DICOMDIR" in finding.message for finding in report.findings if finding.severity == "warning")
    assert {row.spacing for row in report.cases} == {(0.2, 0.14)} and {row.dtype for row in report.cases} == {"uint16"}
    assert not any("pixel size" in finding.message for finding in report.findings)


def test_the_mask_of_a_picture_is_a_png_of_its_size(tmp_path: Path) -> None:
    image = load_picture(written(tmp_path / "a.dcm"))
    label = (VALUES > 2000).astype(np.uint8)
    path = write_label(label, image, tmp_path / "a_lung")
    assert path.name == "a_lung.png"
    np.testing.assert_array_equal(load_picture(path, label=True).values, label)
    report = SiteReport(str(tmp_path), cases=[CaseRow("a")], colour=True)
    assert check_case(report, Case("a", tmp_path / "a.dcm", path, "a"), (0, 1)) is not None and report.ok


def test_no_segmentation_object_refers_to_a_picture(tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match="picture without a place") as caught:
        check_series([written(tmp_path / "a.dcm")])
    assert caught.value.code == "E32" and str(tmp_path / "a.dcm") in str(caught.value)
