"""What the page is told is what the project's own inference and evaluation say, and what is saved is kept apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from image_files import head, series
from PIL import Image
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.difference import difference as areas_of
from pfedsam.evaluation.metrics import case_metrics
from pfedsam.inference.predict import Predictor
from pfedsam.viewer.grid import Grid
from pfedsam.viewer.masks import AREAS, Classes, Mask, dice_of, difference
from pfedsam.viewer.session import Session
from pfedsam.viewer.subjects import subjects_of


def values(nifti: bytes) -> np.ndarray:
    return np.asarray(nibabel.Nifti1Image.from_bytes(nifti).dataobj)


def session_of(path: Path, model: Path | None = None, **how: int) -> Session:
    return Session(subjects_of(path, model), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["global", "personal"])
def test_masks_and_probabilities_are_those_of_the_inference(site: Path, brain_model: Path, model: str) -> None:
    session, image = session_of(site, brain_model), site / "images" / "one.nii.gz"
    found = Predictor(brain_model, experts=model == "personal")(image)
    grid = Grid.of(found.image)
    np.testing.assert_array_equal(values(session.mask(0, model)), grid.shown(found.label()))
    percent = np.rint(100 * grid.shown(found.probabilities[0]))
    np.testing.assert_array_equal(values(session.probability(0, model, 0)), percent)
    assert 0 < found.label().mean() < 1


def test_the_models_differ(site: Path, brain_model: Path) -> None:
    session = session_of(site, brain_model)
    assert session.mask(0, "global") != session.mask(0, "personal")


def test_dice_is_that_of_the_evaluation(eyes: Path, eye_model: Path) -> None:
    session = session_of(eyes, eye_model)
    told = session.found(0, "personal")
    found = Predictor(eye_model)(eyes / "images" / "eye.png").probabilities > 0.5
    truth = load_picture(eyes / "labels" / "eye.png", label=True).values
    nested = np.stack([truth >= 1, truth == 2])
    expected = case_metrics(torch.from_numpy(found), torch.from_numpy(nested)).dice
    assert told["dice"] == pytest.approx(expected) and len(expected) == 2
    assert told["voxels"] == [int(one.sum()) for one in found]


def test_a_difference_has_what_was_found_missed_and_wrong() -> None:
    def mask(*numbers: int) -> Mask:
        row = np.array(numbers, np.uint8).reshape(-1, 1, 1)
        return Mask(row, np.stack([row == 1, row == 2]))

    found, truth = mask(0, 1, 0, 1, 1, 2), mask(0, 1, 2, 0, 2, 2)
    expected = ["", "found", "missed", "wrong", "wrong", "found"]
    assert difference(found, truth).ravel().tolist() == [AREAS.get(name, 0) for name in expected]
    # the report has the same areas
    for name, area in areas_of(truth.channels, found.channels).items():
        assert area.ravel().tolist() == [one == name for one in expected]
    assert dice_of(mask(0, 0), mask(0, 0)) == [1.0, 1.0] and dice_of(mask(0, 1), mask(0, 0)) == [0.0, 1.0]


def test_a_box_is_the_inferences_in_the_grid_of_the_file(site: Path, brain_model: Path) -> None:
    session = session_of(site, brain_model)
    assert session.about(0)["boxes"]
    # the page has shown what the model finds without a box before
    session.mask(0, "personal")
    shown, grid = [5, 15, 4, 19, 2, 4], Grid.of(load_picture(site / "images" / "one.nii.gz"))
    found = values(session.segment(0, "personal", shown))
    expected = Predictor(brain_model)(site / "images" / "one.nii.gz", grid.box(shown)).label()
    np.testing.assert_array_equal(found, grid.shown(expected))
    outside = np.ones(found.shape, bool)
    outside[:, :, 2:5] = False
    assert not found[outside].any()
    assert session.found(0, "box")["voxels"] == [int(found.sum())]


def test_a_model_without_boxes_says_so(eyes: Path, eye_model: Path) -> None:
    session = session_of(eyes, eye_model)
    assert not session.about(0)["boxes"]
    with pytest.raises(PFedSAMError, match=r"E32: .*trained with boxes"):
        session.segment(0, "personal", [0, 5, 0, 5, 0, 0])


def test_an_image_of_another_kind_than_the_bundles_is_a_sentence(site: Path, eye_model: Path) -> None:
    session = session_of(site / "images" / "two.nii.gz", eye_model)
    with pytest.raises(PFedSAMError, match=r"E05: .*is a volume"):
        session.mask(0, "personal")


def test_without_a_model_the_values_of_a_label_are_its_classes(eyes: Path, tmp_path: Path) -> None:
    session = session_of(eyes)
    assert session.about(0) | {"notes": []} == {
        **{"case": "eye", "site": "eyes", "kind": "picture", "shape": (80, 60, 1), "steps": (1, 1, 1)},
        **{"classes": ("value 1", "value 2"), "unknown": False, "labels": {0: 0, 1: 1, 2: 2}},
        **{"models": (), "truth": True, "boxes": False},
        **{"notes": [], "cannot_save": None},
    }
    assert session.about(1)["truth"] is False and json.dumps(session.about(1))
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "white.png")
    Image.fromarray(np.array([[5, 9]], np.uint8)).save(tmp_path / "p.png")
    white = Session(subjects_of(tmp_path / "p.png", labels=tmp_path / "white.png"))
    assert values(white.mask(0, "truth")).ravel().tolist() == [0, 1]


def test_classes_of_a_bundle_are_nested_as_its_training_has_them() -> None:
    assert Classes.of_bundle("fundus_disc_cup", {}) == Classes(("disc", "cup"), ((1, 2), (2,)), True)


def test_an_empty_prediction_is_empty(site: Path, brain_model: Path) -> None:
    assert not values(session_of(site, brain_model).mask(0, "empty")).any()


def test_a_correction_becomes_the_label_of_its_case(site: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    copy = mine / "images" / "two.nii.gz"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((site / "images" / "two.nii.gz").read_bytes())
    session = session_of(copy)
    grid = Grid.of(load_picture(copy))
    drawn = np.zeros(grid.shown_shape, np.uint8)
    drawn[3:6, 4:9, 2] = 1
    path = session.save(0, "empty", drawn.tobytes("F"))
    assert path == mine / "labels" / "two.nii.gz" and path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    saved = load_picture(path, label=True)
    np.testing.assert_array_equal(grid.shown(saved.values), drawn)
    np.testing.assert_allclose(saved.affine, load_picture(copy).affine)
    # the label is there now: further ones are kept beside it, and nothing is replaced
    before = path.read_bytes()
    names = [session.save(0, "empty", (drawn * 0).tobytes("F")).relative_to(mine).as_posix() for _ in range(2)]
    assert names == ["corrections/two.nii.gz", "corrections/two-2.nii.gz"] and path.read_bytes() == before
    assert {one.name for one in mine.rglob("*") if one.is_file()} == {"two.nii.gz", "two-2.nii.gz"}


def test_a_correction_of_a_picture_is_a_picture(eyes: Path) -> None:
    session = session_of(eyes / "images" / "tiny.png")
    drawn = np.zeros((7, 9, 1), np.uint8)
    drawn[2, 8, 0] = 1  # at the top
    path = session.save(0, "empty", drawn.tobytes("F"))
    rows = np.asarray(Image.open(path))
    assert path.parent.name == "labels" and rows.shape == (9, 7) and rows[0, 2] == 1 and rows.sum() == 1
    path.unlink()


def test_a_series_of_dicom_is_corrected_as_nifti(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct" / "images" / "scan", head((16, 12, 4)))
    session = session_of(folder)
    drawn = np.ones(session.about(0)["shape"], np.uint8)
    path = session.save(0, "empty", drawn.tobytes("F"))
    assert path.name == "scan.nii.gz" and load_picture(path, label=True).values.all()


@pytest.mark.parametrize("drawing", [b"", b"\0" * 5, b"\2" * (20 * 24 * 8)], ids=["nothing", "few", "no class"])
def test_a_drawing_that_does_not_fit_is_refused(site: Path, drawing: bytes) -> None:
    with pytest.raises(PFedSAMError, match="E16: the drawing has"):
        session_of(site).save(1, "empty", drawing)
    assert not (site / "labels" / "two.nii.gz").exists()


def test_an_image_outside_a_site_folder_cannot_be_corrected(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "p.png")
    session = session_of(tmp_path / "p.png")
    assert "is not in a site folder" in session.about(0)["cannot_save"]
    with pytest.raises(PFedSAMError, match=r"E02: .*not in a site folder"):
        session.save(0, "empty", b"\0" * 16)
    assert [one.name for one in tmp_path.iterdir()] == ["p.png"]


def test_a_large_picture_is_saved_in_its_own_size(tmp_path: Path) -> None:
    image = tmp_path / "x" / "images" / "p.png"
    image.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((30, 50), np.uint8)).save(image)
    session = session_of(image, most=20)
    drawn = np.zeros(session.about(0)["shape"], np.uint8)
    drawn[0, -1, 0] = 1
    rows = np.asarray(Image.open(session.save(0, "empty", drawn.tobytes("F"))))
    assert rows.shape == (30, 50) and rows[:3, :3].all() and rows.sum() == 9


#: Values of a site that exchange the bundle's: without the map they would be read the wrong way round, in silence.
SITES_OWN = {"1": "cup", "2": "disc", "7": "disc"}


@pytest.fixture
def other_values(eyes: Path, tmp_path: Path) -> Path:
    """The site of pictures with values of its own in its label."""
    shutil.copytree(eyes, tmp_path / "own")
    label = tmp_path / "own" / "labels" / "eye.png"
    Image.fromarray(np.array([0, 2, 1], np.uint8)[np.asarray(Image.open(label))]).save(label)
    return tmp_path / "own"


def test_a_sites_own_label_values_are_read_as_its_settings_say(eyes: Path, eye_model: Path, other_values: Path) -> None:
    subjects = subjects_of(other_values, eye_model)
    told = Session(subjects, label_map=SITES_OWN)
    plain = session_of(eyes, eye_model)
    assert told.mask(0, "truth") == plain.mask(0, "truth") != Session(subjects).mask(0, "truth")
    assert told.found(0, "truth") == plain.found(0, "truth")
    with pytest.raises(PFedSAMError) as caught:
        Session(subjects, label_map={"1": "lens"}).about(0)
    assert caught.value.code == "E01" and "lens" in str(caught.value)


def test_a_correction_has_the_values_of_its_site(eye_model: Path, other_values: Path) -> None:
    session = Session(subjects_of(other_values / "images" / "eye.png", eye_model), label_map=SITES_OWN)
    drawing = np.zeros(session.about(0)["shape"], np.uint8)
    drawing[3:6, 3:6], drawing[10:12, 10:12] = 1, 2
    path = session.save(0, "empty", drawing.tobytes(order="F"))
    saved = load_picture(path, label=True).values
    # disc is 2 or 7 here, cup 1; the smallest is written
    assert [int((saved == value).sum()) for value in (1, 2, 7)] == [4, 9, 0]
    again = Session(subjects_of(other_values / "images" / "eye.png", eye_model, path), label_map=SITES_OWN)
    assert [np.count_nonzero(values(again.mask(0, "truth")) == number) for number in (1, 2)] == [9, 4]


def test_a_class_without_a_value_of_the_site_is_not_saved(eye_model: Path, other_values: Path) -> None:
    image = other_values / "images" / "tiny.png"
    session = Session(subjects_of(image, eye_model), label_map={"2": "disc", "300": "cup"})
    drawing = np.full(session.about(0)["shape"], 2, np.uint8).tobytes()
    with pytest.raises(PFedSAMError) as caught:
        session.save(0, "empty", drawing)
    assert caught.value.code == "E01" and "cup" in str(caught.value)
    assert not (other_values / "labels" / "tiny.png").exists()


def test_view_takes_the_label_values_of_a_kit(eye_model: Path, other_values: Path, tmp_path: Path) -> None:
    kit, image = tmp_path / "kit", other_values / "images" / "eye.png"

    def told() -> str:
        done = CliRunner().invoke(app, ["view", str(image), "--model", str(eye_model), "--kit", str(kit)])
        assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E01"
        return str(done.exception)

    assert str(kit / "local" / "pfedsam.json") in told()
    (kit / "local").mkdir(parents=True)
    (kit / "local" / "pfedsam.json").write_text(json.dumps({"labels": {"1": "lens"}}))
    assert "lens" in told()


#: What the site below calls unknown.
NOBODY_KNOWS = 9


@pytest.fixture
def scribbled(eyes: Path, tmp_path: Path) -> Path:
    """The site of pictures, where nobody has looked at the lower half."""
    shutil.copytree(eyes, tmp_path / "scribbled")
    label = tmp_path / "scribbled" / "labels" / "eye.png"
    rows = np.asarray(Image.open(label)).copy()
    rows[30:] = NOBODY_KNOWS
    Image.fromarray(rows).save(label)
    (tmp_path / "scribbled" / "datalist.json").write_text(json.dumps({"unknown": NOBODY_KNOWS}))
    return tmp_path / "scribbled"


def test_what_nobody_knows_is_neither_right_nor_wrong(eyes: Path, eye_model: Path, scribbled: Path) -> None:
    session, whole = session_of(scribbled, eye_model), session_of(eyes, eye_model)
    assert session.about(0)["unknown"] and session.about(0)["labels"] == {0: 0, 1: 1, 2: 2, 3: NOBODY_KNOWS}
    truth, of_whole = (values(one.mask(0, "truth"))[..., 0] for one in (session, whole))
    upper = np.s_[:, 30:]  # the page counts from below
    np.testing.assert_array_equal(truth[upper], of_whole[upper])
    assert set(truth[:, :30].ravel().tolist()) == {3} and of_whole[:, :30].any()
    areas, of_all = (values(one.difference(0, "personal"))[..., 0] for one in (session, whole))
    np.testing.assert_array_equal(areas[upper], of_all[upper])
    assert not areas[:, :30].any() and of_all[:, :30].any()
    found, known = Predictor(eye_model)(eyes / "images" / "eye.png").probabilities > 0.5, np.s_[:, :, :30]
    there = load_picture(eyes / "labels" / "eye.png", label=True).values
    nested = np.stack([there >= 1, there == 2])
    expected = case_metrics(torch.from_numpy(found[known]), torch.from_numpy(nested[known])).dice
    assert session.found(0, "personal")["dice"] == pytest.approx(expected)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_correction_keeps_what_nobody_knows(eye_model: Path, scribbled: Path, with_model: bool) -> None:
    session = session_of(scribbled, eye_model if with_model else None)
    drawing = values(session.mask(0, "truth")).copy()
    drawing[:5, -5:], drawing[:5, :5], drawing[70:, -5:] = 2, 1, 3
    path = session.save(0, "truth", drawing.tobytes("F"))
    before, after = (load_picture(one, label=True).values for one in (scribbled / "labels" / "eye.png", path))
    # the page counts from below, the file from above
    expected = before.copy()
    expected[:5, :5], expected[:5, -5:], expected[70:, :5] = 2, 1, NOBODY_KNOWS
    np.testing.assert_array_equal(after, expected)
