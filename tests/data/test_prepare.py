"""Downloads in a documented layout become site folders; everything else is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from image_files import SERIES_AFFINE, head, series
from PIL import Image
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.checks import check_site
from pfedsam.data.prepare import prepare
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError


def picture(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def volume(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), path)


def fundus_mask() -> np.ndarray:
    mask = np.full((8, 6), 255)
    mask[2:6, 1:5] = 128
    mask[3:5, 2:4] = 0
    return mask


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape)


def test_prostate_sites(tmp_path: Path) -> None:
    for site in ("RUNMC", "BIDMC"):
        for n in range(3):
            volume(tmp_path / "in" / site / f"Case0{n}.nii.gz", noise((4, 5, 3), n))
            ending = "Segmentation" if site == "BIDMC" else "segmentation"
            volume(tmp_path / "in" / site / f"Case0{n}_{ending}.nii.gz", np.arange(60).reshape(4, 5, 3) % 3)
    assert prepare("prostate", tmp_path / "in", tmp_path / "out") == {"BIDMC": 3, "RUNMC": 3}
    label = nibabel.load(tmp_path / "out" / "RUNMC" / "labels" / "Case00.nii.gz")
    assert set(np.unique(np.asarray(label.dataobj)).tolist()) == {0, 1}
    assert check_site(tmp_path / "out" / "RUNMC").ok


@pytest.mark.parametrize("layout", ["dofe", "refuge"])
def test_fundus_layouts(tmp_path: Path, layout: str) -> None:
    for n in range(3):
        if layout == "dofe":
            picture(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "image" / f"g{n}.png", noise((8, 6, 3), n))
            picture(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "mask" / f"g{n}.png", fundus_mask())
        else:
            picture(tmp_path / "in" / "Training400" / "Glaucoma" / f"g{n}.jpg", noise((8, 6, 3), n))
            masks = tmp_path / "in" / "Annotation-Training400" / "Disc_Cup_Masks" / "Glaucoma"
            picture(masks / f"g{n}.bmp", fundus_mask())
    (site,) = prepare("fundus", tmp_path / "in", tmp_path / "out")
    label = np.asarray(Image.open(next((tmp_path / "out" / site / "labels").iterdir())))
    assert [(label == value).sum() for value in (0, 1, 2)] == [32, 12, 4]
    assert check_site(tmp_path / "out" / site, [0, 1, 2]).ok


SEEN = {"palette.png": "P", "palette.bmp": "P", "wide.png": "I;16"}


@pytest.mark.parametrize(("name", "mode"), SEEN.items())
def test_fundus_masks_are_what_is_seen_of_them(tmp_path: Path, name: str, mode: str) -> None:
    indices = np.searchsorted([0, 128, 255], fundus_mask()).astype(np.uint8)
    image = Image.fromarray(fundus_mask().astype(np.uint16) * 257)
    if mode == "P":
        image = Image.fromarray(indices).convert("P")
        image.putdata(indices.ravel().tolist())
        image.putpalette([0, 0, 0, 128, 128, 128, 255, 255, 255] + [0] * 759)
    if name.endswith(".bmp"):
        picture(tmp_path / "in" / "Training400" / "Glaucoma" / "G.JPG", noise((8, 6, 3), 0))
        masks = tmp_path / "in" / "Annotation-Training400" / "Disc_Cup_Masks" / "Glaucoma"
        masks.mkdir(parents=True)
        image.save(masks / "g.BMP")
    else:
        picture(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "image" / "g.PNG", noise((8, 6, 3), 0))
        (tmp_path / "in" / "Domain1" / "train" / "ROIs" / "mask").mkdir()
        image.save(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "mask" / "G.png")
    (site,) = prepare("fundus", tmp_path / "in", tmp_path / "out")
    label = np.asarray(Image.open(next((tmp_path / "out" / site / "labels").iterdir())))
    assert [(label == value).sum() for value in (0, 1, 2)] == [32, 12, 4]


def test_masks_of_class_numbers_are_no_fundus_masks(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "image" / "g.png", noise((8, 6, 3), 0))
    picture(tmp_path / "in" / "Domain1" / "train" / "ROIs" / "mask" / "g.png", noise((8, 6), 0) % 3)
    with pytest.raises(PFedSAMError, match=r"E07.*g\.png shows nothing white"):
        prepare("fundus", tmp_path / "in", tmp_path / "out")


def test_prostate_masks_below_0_and_names_that_differ_in_capitals_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "RUNMC"
    volume(folder / "Case00.NII.GZ", noise((4, 5, 3), 0))
    volume(folder / "case00_SEGMENTATION.nii.gz", -(noise((4, 5, 3), 0) % 2))
    with pytest.raises(PFedSAMError, match=r"E07.*holds -1, which is no zone"):
        prepare("prostate", tmp_path / "in", tmp_path / "out")
    volume(folder / "case00_SEGMENTATION.nii.gz", noise((4, 5, 3), 0) % 2)
    assert prepare("prostate", tmp_path / "in", tmp_path / "out") == {"RUNMC": 1}
    volume(folder / "CASE00.nii.gz", noise((4, 5, 3), 0))
    with pytest.raises(PFedSAMError, match=r"E09.*capitals"):
        prepare("prostate", tmp_path / "in", tmp_path / "other")


def test_files_that_would_be_left_out_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "clinic" / "images" / "a.png", noise((8, 6), 0))
    picture(tmp_path / "in" / "clinic" / "masks" / "a.png", np.eye(8, 6))
    (tmp_path / "in" / "clinic" / "images" / "b.webp").touch()
    with pytest.raises(PFedSAMError, match=r"E09.*b\.webp"):
        prepare("images", tmp_path / "in", tmp_path / "out")


def test_plain_images_with_masks(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "in" / "clinic" / "images" / f"a{n}.png", noise((8, 6), n))
        picture(tmp_path / "in" / "clinic" / "masks" / f"a{n}_mask.png", 255 * np.eye(8, 6))
    told = ["prepare", "images", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0 and "3 cases" in done.output
    assert set(np.unique(np.asarray(Image.open(tmp_path / "out" / "clinic" / "labels" / "a0.png"))).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("stored", "kept"), [([0, 300], [0, 300]), ([0, -1], [-1, 0]), ([0, 0.99999], [0, 1]), ([0, 255], [0, 1])]
)
def test_values_of_masks_are_kept(tmp_path: Path, stored: list[float], kept: list[int]) -> None:
    mask = np.resize(np.array(stored), (4, 5, 3))
    volume(tmp_path / "in" / "clinic" / "images" / "a.NII.GZ", noise((4, 5, 3), 1))
    volume(tmp_path / "in" / "clinic" / "masks" / "a_mask.nii.gz", mask)
    prepare("images", tmp_path / "in", tmp_path / "out")
    label = nibabel.load(tmp_path / "out" / "clinic" / "labels" / "a.nii.gz")
    assert np.unique(np.asarray(label.dataobj)).tolist() == kept
    assert label.header.get_slope_inter() == (None, None)


@pytest.mark.parametrize(("value", "word"), [(0.5, "0.5"), (-1, "-1")])
def test_a_mask_that_cannot_be_kept_is_refused_by_name(tmp_path: Path, value: float, word: str) -> None:
    picture(tmp_path / "in" / "clinic" / "images" / "a.png", noise((8, 6), 0))
    (tmp_path / "in" / "clinic" / "masks").mkdir()
    Image.fromarray(np.full((8, 6), value, np.float32)).save(tmp_path / "in" / "clinic" / "masks" / "a.tif")
    with pytest.raises(PFedSAMError, match=rf"E07.*a\.tif.*{word}"):
        prepare("images", tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_indices_of_a_palette_are_the_classes(tmp_path: Path) -> None:
    mask = np.resize(np.array([0, 1, 2], np.uint8), (8, 6))
    picture(tmp_path / "in" / "clinic" / "images" / "a.png", noise((8, 6, 3), 0))
    coloured = Image.fromarray(mask).convert("P")
    coloured.putdata(mask.ravel().tolist())
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    (tmp_path / "in" / "clinic" / "masks").mkdir()
    coloured.save(tmp_path / "in" / "clinic" / "masks" / "a.png")
    prepare("images", tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "clinic" / "labels" / "a.png")), mask)


def test_series_are_copied_with_a_mask_in_their_place(tmp_path: Path) -> None:
    values = head()
    series(tmp_path / "in" / "clinic" / "images" / "1.2.3", values)
    mask = (values > 99).astype(np.uint8)
    # stored in another order of the axes, at the same place
    way = nibabel.orientations.axcodes2ornt(("P", "S", "R"))
    turned = nibabel.Nifti1Image(mask, SERIES_AFFINE).as_reoriented(way)
    nibabel.save(turned, tmp_path / "in" / "clinic" / "1.2.3.nii.gz")
    (tmp_path / "in" / "clinic" / "masks").mkdir()
    (tmp_path / "in" / "clinic" / "1.2.3.nii.gz").rename(tmp_path / "in" / "clinic" / "masks" / "1.2.3.nii.gz")
    assert prepare("images", tmp_path / "in", tmp_path / "out") == {"clinic": 1}
    found = load_picture(tmp_path / "out" / "clinic" / "images" / "1.2.3")
    np.testing.assert_array_equal(found.values, values)
    label = load_picture(tmp_path / "out" / "clinic" / "labels" / "1.2.3.nii.gz", label=True)
    np.testing.assert_array_equal(label.values, mask)
    np.testing.assert_allclose(label.affine, found.affine)


def test_what_is_not_documented_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "clinic" / "images" / "a.png", noise((8, 6), 0))
    with pytest.raises(PFedSAMError, match=r"E03.*a\.png"):
        prepare("images", tmp_path / "in", tmp_path / "out")
    with pytest.raises(PFedSAMError, match="E02"):
        prepare("fundus", tmp_path / "in", tmp_path / "out")
    with pytest.raises(PFedSAMError, match="E28"):
        prepare("teeth", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    picture(tmp_path / "in" / "clinic" / "labels" / "a.png", noise((4, 6), 0))
    with pytest.raises(PFedSAMError, match="E04"):
        prepare("images", tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "clinic").mkdir()
    with pytest.raises(PFedSAMError, match="E24"):
        prepare("images", tmp_path / "in", tmp_path / "out")
