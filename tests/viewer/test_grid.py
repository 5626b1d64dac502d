"""The grid that is shown and the grid of the file: what is pointed at in one lies there in the other."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from pfedsam.data.picture import Picture
from pfedsam.viewer.grid import Grid, window_of

CODES = ["RAS", "LPS", "SAR", "IPL", "ARS"]


def grid(codes: str, shape: tuple[int, ...], most: int = 2048) -> Grid:
    turn = nibabel.orientations.axcodes2ornt(tuple(codes))
    affine = nibabel.orientations.inv_ornt_aff(turn, shape)
    return Grid(shape, np.diag([2.0, 3.0, 4.0, 1.0]) @ affine, most=most)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("most", [2048, 7])
def test_what_is_shown_lies_at_its_millimetres(codes: str, most: int) -> None:
    one, values = grid(codes, (13, 9, 17), most), np.random.default_rng(0).integers(0, 99, (13, 9, 17), np.uint8)
    image = nibabel.Nifti1Image.from_bytes(one.nifti(values))
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.shape == one.shown_shape and max(image.shape) <= most
    to_file = np.linalg.inv(one.affine) @ image.affine
    at = np.indices(image.shape).reshape(3, -1)
    there = np.rint(to_file[:3, :3] @ at + to_file[:3, 3:]).astype(int)
    np.testing.assert_array_equal(np.asarray(image.dataobj)[tuple(at)], values[tuple(there)])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("most", [2048, 7])
def test_a_box_holds_in_the_file_what_it_holds_on_the_screen(codes: str, most: int) -> None:
    one = grid(codes, (13, 9, 17), most)
    box = one.box([1, 2, 0, 1, 2, 1])  # the ends of an axis in any order
    inside = np.zeros(one.shape, bool)
    inside[tuple(slice(a, b + 1) for a, b in zip(box[::2], box[1::2], strict=True))] = True
    found = np.argwhere(one.shown(inside))
    assert found.min(0).tolist() == [1, 0, 1] and found.max(0).tolist() == [2, 1, 2]


def test_a_box_is_cut_to_the_image() -> None:
    assert grid("LPS", (13, 9, 17)).box([-5, 99, 0, 3, 16, 16]) == [0, 12, 5, 8, 16, 16]


@pytest.mark.parametrize("codes", CODES)
def test_a_drawing_comes_back_to_its_voxels(codes: str) -> None:
    one, mask = grid(codes, (13, 9, 17)), np.random.default_rng(1).integers(0, 3, (13, 9, 17), np.uint8)
    np.testing.assert_array_equal(one.drawn(one.shown(mask), np.zeros_like(mask)), mask)


@pytest.mark.parametrize("codes", CODES)
def test_a_drawing_on_fewer_voxels_changes_only_what_was_drawn(codes: str) -> None:
    one, start = grid(codes, (13, 9, 17), 7), np.random.default_rng(1).integers(0, 2, (13, 9, 17), np.uint8)
    np.testing.assert_array_equal(one.drawn(one.shown(start), start), start)
    drawn = one.shown(start).copy()
    at = (2, 1, 3)
    drawn[at] = 2
    changed = one.drawn(drawn, start)
    box = one.box([at[0], at[0], at[1], at[1], at[2], at[2]])
    where = tuple(slice(a, b + 1) for a, b in zip(box[::2], box[1::2], strict=True))
    assert (changed[where] == 2).all() and changed[where].size == np.prod(one.steps) > 1
    changed[where] = start[where]
    np.testing.assert_array_equal(changed, start)


def test_a_picture_is_upright_and_its_box_has_no_slices() -> None:
    values = np.zeros((40, 30), np.uint8)
    values[3, 1] = 9  # near the top
    picture = Picture(values, "picture", Path("p.png"))
    one = Grid.of(picture)
    shown = nibabel.Nifti1Image.from_bytes(one.nifti(values[..., None]))
    assert shown.shape == (40, 30, 1) and shown.dataobj[3, 28, 0] == 9
    assert one.box([3, 5, 28, 29, 0, 0]) == [3, 5, 0, 1]


def test_a_large_picture_keeps_its_shape() -> None:
    one = Grid.of(Picture(np.zeros((50, 20), np.uint8), "picture", Path("p.png")), most=20)
    assert one.steps == (3, 3, 1) and one.shown_shape == (17, 7, 1)


def test_colours_stay_colours() -> None:
    values = np.random.default_rng(0).integers(0, 255, (5, 4, 1, 3), np.uint8)
    one = Grid.of(Picture(values[:, :, 0], "picture", Path("p.png")))
    shown = nibabel.Nifti1Image.from_bytes(one.nifti(values))
    assert shown.get_data_dtype() == np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert tuple(np.asarray(shown.dataobj)[2, 0, 0]) == tuple(values[2, 3, 0])


@pytest.mark.parametrize("values", [np.full((4, 4, 2), 7.0), np.zeros((4, 4, 2), np.int64)])
def test_an_image_of_one_value_has_a_window(values: np.ndarray) -> None:
    low, high = window_of(Picture(values, "volume", Path("v.nii")))
    assert low == values.min() and high > low
