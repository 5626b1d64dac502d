"""Label values are whole numbers, or refused by name; nothing is cast on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import SERIES_AFFINE, nifti, scaled_nifti, series
from PIL import Image

from pfedsam.data.labels import black_and_white, found_values, whole_numbers
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError

MASK = np.zeros((8, 6), np.uint8)
MASK[2:6, 1:5], MASK[3:5, 2:4] = 1, 2


@pytest.mark.parametrize(("given", "expected"), [(0.9999999, 1), (1.009, 1), (1.991, 2), (-0.01, 0), (300.0, 300)])
def test_what_is_nearly_whole_is_that_number(given: float, expected: int) -> None:
    found = whole_numbers(np.array([[0, given]], np.float32), "a")
    assert found.tolist() == [[0, expected]] and found.dtype.kind in "ui"


@pytest.mark.parametrize("given", [0.5, 0.98, 1.02, 254.6])
def test_what_is_between_is_refused_with_its_value(given: float) -> None:
    with pytest.raises(PFedSAMError, match=rf"E07.*'a' holds {given:.6g}, expected whole numbers"):
        whole_numbers(np.array([0, 1, given]), "a")


@pytest.mark.parametrize("values", [[-1, 300], [0, 255], [0, 40_000], [-(2**31), 2**31 - 1]])
@pytest.mark.parametrize("kind", [np.int64, np.float64])
def test_no_value_is_wrapped(values: list[int], kind: type) -> None:
    found = whole_numbers(np.array(values, kind), "a")
    assert found.tolist() == values and found_values(found) == values


@pytest.mark.parametrize("far", [2**31, -(2**40)])
def test_what_is_no_class_number_is_refused(far: int) -> None:
    with pytest.raises(PFedSAMError, match=f"E07.*'a' holds {far:g}, which is no class number".replace("+", r"\+")):
        whole_numbers(np.array([0, far]), "a")


def test_white_is_foreground_where_there_is_nothing_else() -> None:
    assert black_and_white([0, 255], (0, 1)) == 255
    assert black_and_white([255], (0, 1)) == 255
    assert black_and_white([0, 65535], (0, 1)) == 65535
    for found, known in (([0, 255], (0, 255)), ([0, 1, 255], (0, 1)), ([0], (0, 1)), ([0, 254], (0, 1))):
        assert black_and_white(found, known) is None


def test_every_format_of_a_label_gives_its_numbers(tmp_path: Path) -> None:
    coloured = Image.fromarray(MASK)
    coloured = coloured.convert("P")
    coloured.putdata(MASK.ravel().tolist())
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    coloured.save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(MASK).save(tmp_path / "grey.png")
    Image.fromarray(MASK.astype(np.uint16)).save(tmp_path / "wide.tif")
    Image.fromarray(np.stack([MASK] * 3, -1)).save(tmp_path / "three.png")
    Image.fromarray(MASK).convert("LA").save(tmp_path / "alpha.png")
    Image.fromarray(MASK.astype(np.float32) * np.float32(0.99999)).save(tmp_path / "float.tif")
    for name in ("palette.png", "grey.png", "wide.tif", "three.png", "alpha.png", "float.tif"):
        np.testing.assert_array_equal(load_picture(tmp_path / name, label=True).values, MASK.T, err_msg=name)
    volume = MASK.T[..., None]
    scaled_nifti(tmp_path / "scaled.nii", volume.astype(np.int16) * 1000, 0.001, 0, SERIES_AFFINE)
    nifti(tmp_path / "float.nii.gz", volume.astype(np.float64) + 1e-3)
    series(tmp_path / "series", volume)
    for name in ("scaled.nii", "float.nii.gz", "series"):
        np.testing.assert_array_equal(load_picture(tmp_path / name, label=True).values, volume, err_msg=name)
    Image.fromarray(MASK > 0).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(load_picture(tmp_path / "bit.png", label=True).values, MASK.T > 0)


def test_a_mask_in_colours_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((*MASK.shape, 3), np.uint8)
    colours[MASK == 1] = (255, 0, 0)
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(PFedSAMError, match=r"E07.*a\.png' has 3 different channels"):
        load_picture(tmp_path / "a.png", label=True)


def test_a_mask_that_is_in_its_alpha_channel_is_refused(tmp_path: Path) -> None:
    """All is white, and what is transparent is the background: without the alpha channel all would be foreground."""
    white = np.full((*MASK.shape, 4), 255, np.uint8)
    white[MASK == 0, 3] = 0
    Image.fromarray(white).save(tmp_path / "a.png")
    with pytest.raises(PFedSAMError, match=r"E05.*a\.png.*alpha"):
        load_picture(tmp_path / "a.png", label=True)
