"""Styles of annotation: what each changes, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from style import changed

STYLE = Path(__file__).parent / "style.py"


def disc(radius: float, size: int = 41) -> np.ndarray:
    rows, columns = np.indices((size, size)) - size // 2
    return (rows**2 + columns**2 <= radius**2).astype(np.uint8)


@pytest.mark.parametrize(("style", "radius"), [("dilate:3", 13), ("erode:3", 7), ("fill", 10), ("drop:5", 10)])
def test_a_disc_grows_and_shrinks_by_the_pixels_that_are_named(style: str, radius: int) -> None:
    after = changed(disc(10), style)
    assert abs(int(after.sum()) - int(disc(radius).sum())) <= 0.1 * disc(radius).sum()


def test_what_grows_takes_no_pixel_of_another_class() -> None:
    label = np.zeros((10, 10), np.uint8)
    label[:4], label[6:] = 1, 2
    after = changed(label, "dilate:9")
    assert (after[:5] == 1).all() and (after[5:] == 2).all()


def test_small_parts_go_and_holes_are_filled() -> None:
    label = disc(12)
    label[20, 20] = 0
    label[0, :3] = 1
    after = changed(label, "drop:4+fill")
    assert np.array_equal(after, disc(12))


def test_sides_and_exchange_name_halves_the_other_way_round() -> None:
    label = np.ones((6, 4), np.uint8)
    assert changed(label, "sides")[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert changed(label, "sides+exchange")[:, 0].tolist() == [2, 2, 2, 1, 1, 1]
    assert np.array_equal(changed(label, "sides+exchange+exchange"), changed(label, "sides"))


def test_sites_are_written_with_links_split_and_a_note(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        for site in ("a", "b"):
            (tmp_path / "data" / site / kind).mkdir(parents=True)
    Image.fromarray(disc(9)[:30] * 1).save(tmp_path / "data/a/labels/one.png")
    Image.fromarray(disc(9)[:30] * 200).save(tmp_path / "data/a/images/one.png")
    volume = np.stack([disc(9)] * 3, axis=-1)
    for kind in ("images", "labels"):
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([2.0, 2, 5, 1])), tmp_path / f"data/b/{kind}/two.nii.gz")
    (tmp_path / "data/b/datalist.json").write_text('{"patients": {"two": "p"}}')
    words = [sys.executable, STYLE, tmp_path / "data", tmp_path / "out", "--site", "b=erode:2"]
    subprocess.run(list(map(str, words)), check=True)
    out = tmp_path / "out"
    assert json.loads((out / "styles.json").read_text()) == {"b": "erode:2"}
    assert (out / "a/labels/one.png").is_symlink() and (out / "b/images/two.nii.gz").is_symlink()
    assert (out / "b/datalist.json").read_text() == '{"patients": {"two": "p"}}'
    after = nibabel.load(out / "b/labels/two.nii.gz")
    assert np.array_equal(np.asarray(after.dataobj)[..., 1], changed(disc(9), "erode:2"))
    assert np.allclose(after.affine, np.diag([2.0, 2, 5, 1]))


def test_an_inverted_site_has_its_labels_and_the_negative_of_its_images(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data/a" / kind).mkdir(parents=True)
        (tmp_path / "data/b" / kind).mkdir(parents=True)
    values = np.arange(-20, 100, dtype=np.int16).reshape(10, 4, 3)
    for site in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"data/{site}/images/one.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image((values > 0).astype(np.uint8), np.eye(4)), tmp_path / f"data/{site}/labels/one.nii.gz"
        )
    command = [sys.executable, str(STYLE), str(tmp_path / "data"), str(tmp_path / "out"), "--inverted", "a"]
    subprocess.run(command, check=True)
    after = np.asarray(nibabel.load(tmp_path / "out/a/images/one.nii.gz").dataobj)
    assert after.dtype == np.int16 and np.array_equal(after, 79 - values)
    assert (tmp_path / "out/a/labels/one.nii.gz").is_symlink() and (tmp_path / "out/b/images/one.nii.gz").is_symlink()
    assert json.loads((tmp_path / "out/styles.json").read_text()) == {"a": "inverted"}


def test_a_style_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / "data/a" / kind).mkdir(parents=True)
        Image.fromarray(disc(3)).save(tmp_path / "data/a" / kind / "one.png")
    words = [sys.executable, STYLE, tmp_path / "data", tmp_path / "out", "--site", "a=erode:9"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode and "nothing is left of it in the style erode:9" in done.stderr
