"""Downloads in a documented layout become site folders; everything else is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.checks import check_site
from pfedsam.data.prepare import prepare
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


def test_plain_images_with_masks(tmp_path: Path) -> None:
    for n in range(3):
        picture(tmp_path / "in" / "clinic" / "images" / f"a{n}.png", noise((8, 6), n))
        picture(tmp_path / "in" / "clinic" / "masks" / f"a{n}_mask.png", 255 * np.eye(8, 6))
    told = ["prepare", "images", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0 and "3 cases" in done.output
    assert set(np.unique(np.asarray(Image.open(tmp_path / "out" / "clinic" / "labels" / "a0.png"))).tolist()) == {0, 1}


def test_what_is_not_documented_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "clinic" / "images" / "a.png", noise((8, 6), 0))
    with pytest.raises(PFedSAMError, match=r"E03.*a\.png"):
        prepare("images", tmp_path / "in", tmp_path / "out")
    with pytest.raises(PFedSAMError, match="E02"):
        prepare("fundus", tmp_path / "in", tmp_path / "out")
    with pytest.raises(PFedSAMError, match="E16"):
        prepare("teeth", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    picture(tmp_path / "in" / "clinic" / "labels" / "a.png", noise((4, 6), 0))
    with pytest.raises(PFedSAMError, match="E04"):
        prepare("images", tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "clinic").mkdir()
    with pytest.raises(PFedSAMError, match="E16"):
        prepare("images", tmp_path / "in", tmp_path / "out")
