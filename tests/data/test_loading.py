"""The reader as the first transform of a bundle."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from image_files import SERIES_AFFINE, head, nifti, series
from monai.bundle import ConfigParser
from monai.transforms import Invertd, ScaleIntensityRangePercentilesd
from PIL import Image

from pfedsam.bundles import find_bundle
from pfedsam.data.intensity import NO_WINDOW, window_is_empty
from pfedsam.data.loading import ReadImaged, in_c_order
from pfedsam.data.reader import load_picture
from pfedsam.data.transforms import IntensityWindowd
from pfedsam.errors import PFedSAMError

VALUES = head()
GREY = np.ascontiguousarray(head((20, 14, 1))[..., 0].T.astype(np.uint8))
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], axis=-1)
BOTH = ReadImaged(["image", "label"], labels="label")


def save(path: Path, values: np.ndarray) -> str:
    Image.fromarray(values).save(path)
    return str(path)


def test_a_volume_and_its_label_are_channel_first_with_their_affine(tmp_path: Path) -> None:
    image = nifti(tmp_path / "a.nii.gz", VALUES, SERIES_AFFINE)
    label = nifti(tmp_path / "l.nii.gz", (VALUES > 99).astype(np.uint8), SERIES_AFFINE)
    found = BOTH({"image": str(image), "label": str(label), "case": "a"})
    assert found["image"].shape == found["label"].shape == (1, *VALUES.shape) and found["case"] == "a"
    np.testing.assert_array_equal(found["image"][0], VALUES)
    np.testing.assert_allclose(found["label"].affine, SERIES_AFFINE)
    assert found["image"].meta["filename_or_obj"] == str(image) and found["image"].dtype == torch.float32


def test_a_label_without_geometry_lies_where_its_image_does_and_the_other_way_round(tmp_path: Path) -> None:
    """Else the transforms that follow would flip the one and not the other."""
    mask = (VALUES[..., :1] > 99).astype(np.uint8)
    volume = series(tmp_path / "s", VALUES[..., :1])
    flat = save(tmp_path / "l.png", mask[..., 0].T)
    there = load_picture(volume).affine
    for image, label in ((str(volume), flat), (flat, str(volume))):
        found = ReadImaged(["image", "label"])({"image": image, "label": label})
        np.testing.assert_allclose(found["image"].affine, there)
        np.testing.assert_allclose(found["label"].affine, there)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSL", "AIR"])
def test_a_label_that_was_drawn_on_a_copy_is_turned_as_its_image(tmp_path: Path, codes: str) -> None:
    """As a tool saves a label of a DICOM series: at the same place, stored the other way round."""
    mask = (VALUES > 99).astype(np.uint8)
    label = nibabel.Nifti1Image(mask, SERIES_AFFINE).as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(SERIES_AFFINE), nibabel.orientations.axcodes2ornt(tuple(codes))
        )
    )
    nibabel.save(label, tmp_path / "l.nii.gz")
    found = BOTH({"image": str(series(tmp_path / "s", VALUES)), "label": str(tmp_path / "l.nii.gz")})
    np.testing.assert_array_equal(found["label"][0], mask)
    np.testing.assert_allclose(found["label"].affine, SERIES_AFFINE, atol=1e-5)


def test_pictures_are_volumes_of_one_slice_for_a_bundle_of_volumes(tmp_path: Path) -> None:
    colour, grey = save(tmp_path / "c.png", COLOUR), save(tmp_path / "g.png", GREY)
    found = BOTH({"image": colour, "label": save(tmp_path / "l.png", (GREY > 30).astype(np.uint8))})
    assert found["image"].shape == found["label"].shape == (1, 20, 14, 1)
    # luma of ITU-R BT.601
    np.testing.assert_allclose(found["image"][0, ..., 0].T, COLOUR @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(ReadImaged("image")({"image": grey})["image"][0, ..., 0].T, GREY)


def test_white_is_255_for_a_bundle_of_colour_pictures(tmp_path: Path) -> None:
    read = ReadImaged("image", colour=True)
    eight, wide = save(tmp_path / "e.png", GREY), save(tmp_path / "w.png", GREY.astype(np.uint16) * 257)
    first, second = (read({"image": path})["image"] for path in (eight, wide))
    assert first.shape == (3, 20, 14)
    np.testing.assert_allclose(first, second, atol=1e-4)
    colour = read({"image": save(tmp_path / "c.png", COLOUR)})["image"]
    np.testing.assert_array_equal(colour, np.moveaxis(COLOUR, (0, 1, 2), (2, 1, 0)))


def test_the_mask_of_a_photograph_may_be_a_volume_of_one_slice(tmp_path: Path) -> None:
    mask = (GREY.T > 10).astype(np.uint8)[..., None]
    label = nifti(tmp_path / "l.nii.gz", mask, np.diag([-1.0, -1, 1, 1]))
    found = ReadImaged(["image", "label"], labels="label", colour=True)(
        {"image": save(tmp_path / "c.png", COLOUR), "label": str(label)}
    )
    np.testing.assert_array_equal(found["label"][0], mask[..., 0])
    np.testing.assert_array_equal(found["label"].affine, found["image"].affine)


def test_what_a_bundle_cannot_take_is_refused(tmp_path: Path) -> None:
    volume = str(nifti(tmp_path / "a.nii", VALUES))
    with pytest.raises(PFedSAMError, match=r"E05.*a\.nii is a volume.*Use a bundle for volumes"):
        ReadImaged("image", colour=True)({"image": volume})
    with pytest.raises(PFedSAMError, match=r"E05.*f\.tif holds float32 numbers: nothing says which of them is white"):
        ReadImaged("image", colour=True)({"image": save(tmp_path / "f.tif", GREY.astype(np.float32))})
    with pytest.raises(PFedSAMError, match=r"E04.*a\.nii has shape.*b\.nii"):
        BOTH({"image": volume, "label": str(nifti(tmp_path / "b.nii", np.ones((24, 20, 5), np.uint8)))})
    with pytest.raises(PFedSAMError, match=r"E05.*large\.nii.*too large"):
        ReadImaged("image")({"image": str(nifti(tmp_path / "large.nii", VALUES * 1e300))})


def test_the_window_is_monais_and_its_result_keeps_the_place(tmp_path: Path) -> None:
    item = ReadImaged("image")({"image": str(nifti(tmp_path / "a.nii", VALUES, SERIES_AFFINE))})
    ours = IntensityWindowd("image")(item)["image"]
    monai = ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True)(item)["image"]
    assert torch.equal(ours.as_tensor(), monai.as_tensor()) and torch.equal(ours.affine, monai.affine)
    assert ours.meta["filename_or_obj"] == item["image"].meta["filename_or_obj"]


@pytest.mark.parametrize(("bright", "empty"), [(0, True), (2, True), (40, False)])
def test_an_image_of_nearly_one_value_keeps_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bright: int, empty: bool
) -> None:
    """MONAI subtracts the value, and neither scales nor clips: its result is far outside of 0 to 1."""
    values = np.full((20, 20, 2), 7, np.int16)
    values.reshape(-1)[:bright] = 1000
    assert window_is_empty(values) == empty
    with caplog.at_level(logging.WARNING):
        found = IntensityWindowd("image")(ReadImaged("image")({"image": str(nifti(tmp_path / "a.nii", values))}))
    image = found["image"].as_tensor()
    assert (NO_WINDOW in caplog.text and "a.nii" in caplog.text) == empty
    assert float(image.min()) == 0 and float(image.max()) == (1 if bright else 0)
    assert int((image > 0.5).sum()) == bright


@pytest.mark.parametrize("skewed", ["low", "high"])
def test_the_window_is_empty_exactly_where_numpys_percentiles_coincide(skewed: str) -> None:
    for others in range(60):
        values = np.full(8000, 5.0)
        values[:others] = -1 if skewed == "low" else 9
        low, high = np.percentile(values, (0.5, 99.5))
        assert window_is_empty(values) == (low == high), others


def test_a_tilted_series_goes_through_a_bundles_transforms_and_back(tmp_path: Path) -> None:
    shape, angle = (48, 48, 12), np.deg2rad(20)
    tilted = (1, 0, 0, 0, round(np.cos(angle), 12), round(-np.sin(angle), 12))
    folder = series(tmp_path / "s", head(shape) * 4, orientation=tilted, step=(0, 0, 4.0), origin=(-70, -50, 0))
    parser = ConfigParser()
    parser.read_config(str(find_bundle("brain_lesion_mri") / "configs" / "inference.json"))
    parser["image_size"] = 128
    way = parser.get_parsed_content("preprocessing")
    item = way({"image": str(folder)})
    item["pred"] = item["image"][1:2]
    back = Invertd("pred", way, "image", nearest_interp=False)(item)["pred"]
    assert back.shape == (1, *shape)
    assert np.corrcoef(back.ravel(), head(shape).ravel())[0, 1] > 0.97


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "float32", "float64"])
def test_turning_the_axes_changes_no_value(kind: str) -> None:
    stored = np.asfortranarray(np.random.default_rng(0).integers(0, 200, (7, 5, 3)).astype(kind))
    mapped = stored.copy(order="F")
    mapped.setflags(write=False)
    for values in (stored, stored[None], stored[::-1], stored[..., :1], stored.T, stored[:0], mapped):
        turned = in_c_order(values)
        assert turned.flags.c_contiguous and turned.dtype == values.dtype
        np.testing.assert_array_equal(turned, values)
