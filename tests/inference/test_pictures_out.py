"""What is written of a picture: a mask that a viewer shows, probabilities in 16 bits, outlines in its own size."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import nifti
from PIL import Image
from typer.testing import CliRunner, Result

from pfedsam.cli import app
from pfedsam.data.colours import colour_of
from pfedsam.data.labels import black_and_white, found_values
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError
from pfedsam.inference.overlay import write_overlay
from pfedsam.inference.predict import Prediction
from pfedsam.inference.results import Wanted
from pfedsam.inference.writers import WHITE, write_label, write_probabilities

WIDTH, HEIGHT = 500, 420


@pytest.fixture
def photo(tmp_path: Path) -> Picture:
    rows = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(rows).save(tmp_path / "photo.png")
    return load_picture(tmp_path / "photo.png")


def made(image: Picture, label: np.ndarray, classes: int) -> Prediction:
    """A prediction of classes beside each other with this label map."""
    channels = [0.9 * (label == number) for number in range(1, classes + 1)]
    return Prediction(image, np.stack(channels).astype(np.float32))


def squares(classes: int) -> np.ndarray:
    """A label map `(x, y)` with a square of each class."""
    label = np.zeros((WIDTH, HEIGHT), np.uint8)
    for number in range(1, classes + 1):
        label[40 * number : 40 * number + 30, 100:160] = number
    return label


def test_a_mask_has_a_colour_for_each_class_and_is_read_back_as_it_was(photo: Picture, tmp_path: Path) -> None:
    label = squares(9)
    path = write_label(label, photo, tmp_path / "mask")
    np.testing.assert_array_equal(load_picture(path, label=True).values, label)
    seen = np.asarray(Image.open(path).convert("RGB"))
    for number in range(10):
        here = np.equal(label.T, number)
        colours = {tuple(map(int, one)) for one in np.unique(seen[here], axis=0)}
        assert colours == {(0, 0, 0) if number == 0 else colour_of(number)}
    assert len({colour_of(number) for number in range(1, 9)}) == 8


def test_a_mask_in_black_and_white_is_of_one_class_and_read_back_as_it(photo: Picture, tmp_path: Path) -> None:
    label = squares(1)
    values = load_picture(write_label(label, photo, tmp_path / "mask", WHITE), label=True).values
    assert black_and_white(found_values(values), [0, 1]) == 255
    np.testing.assert_array_equal(values // 255, label)
    with pytest.raises(PFedSAMError, match=r"E32.*has 2"):
        Wanted(("a", "b"), "bundle", "personal", mask=WHITE)
    with pytest.raises(PFedSAMError, match=r"E16.*'blue'"):
        Wanted(("a",), "bundle", "personal", mask="blue")


def test_probabilities_of_a_picture_are_one_png_of_16_bits_for_each_class(photo: Picture, tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((2, WIDTH, HEIGHT)).astype(np.float32)
    paths = write_probabilities(values, photo, tmp_path / "p", ["disc", "cup"])
    assert [path.name for path in paths] == ["p_probability_disc.png", "p_probability_cup.png"]
    for path, channel in zip(paths, values, strict=True):
        kept = load_picture(path)
        assert kept.white == 65535 and kept.values.dtype == np.uint16
        np.testing.assert_allclose(kept.values / 65535, channel, atol=0.51 / 65535)
    (one,) = write_probabilities(values[:1], photo, tmp_path / "p", ["lesion"])
    assert one.name == "p_probability.png"


def overlay(found: Prediction, classes: dict[str, list[int]], tmp_path: Path) -> np.ndarray:
    write_overlay(found, tmp_path / "overlay.png", classes, "personal model")
    return np.asarray(Image.open(tmp_path / "overlay.png"))


def test_outlines_are_drawn_on_the_picture_in_its_own_size(photo: Picture, tmp_path: Path) -> None:
    label = squares(6)
    shown = overlay(made(photo, label, 6), {f"c{n}": [n] for n in range(1, 7)}, tmp_path)
    assert shown.shape[1] == WIDTH and shown.shape[0] > HEIGHT
    rows, here = label.T, shown[:HEIGHT]
    for number in range(1, 7):
        assert tuple(here[100, 40 * number]) == colour_of(number)
    away = np.ones((HEIGHT, WIDTH), bool)
    away[98:162, 38:272] = False
    np.testing.assert_array_equal(here[away], np.swapaxes(photo.values, 0, 1)[away])
    # inside an outline the picture is seen
    np.testing.assert_array_equal(here[130, 55], photo.values[55, 130])
    assert rows[130, 55] == 1


def test_an_empty_prediction_leaves_every_pixel_as_it_is_and_says_so(photo: Picture, tmp_path: Path) -> None:
    empty = made(photo, squares(0), 1)
    full = overlay(made(photo, squares(1), 1), {"lesion": [1]}, tmp_path)[HEIGHT:]
    shown = overlay(empty, {"lesion": [1]}, tmp_path)
    np.testing.assert_array_equal(shown[:HEIGHT], np.swapaxes(photo.values, 0, 1))
    assert shown[HEIGHT:].shape == full.shape and (shown[HEIGHT:] != full).any()


def test_of_nested_classes_the_outer_one_is_outlined_whole(photo: Picture, tmp_path: Path) -> None:
    label = np.zeros((WIDTH, HEIGHT), np.uint8)
    label[100:300, 100:300], label[150:250, 100:250] = 1, 2
    nested = overlay(made(photo, label, 2), {"disc": [1, 2], "cup": [2]}, tmp_path)
    beside = overlay(made(photo, label, 2), {"disc": [1], "cup": [2]}, tmp_path)
    # below the cup there is disc: beside each other it ends there, nested it does not
    assert tuple(beside[251, 200]) == colour_of(1) and tuple(nested[253, 200]) != colour_of(1)


@pytest.mark.parametrize(("shape", "factor"), [((20, 14), 20), ((1, 1), 400), ((399, 30), 2), ((400, 30), 1)])
def test_a_tiny_picture_is_enlarged_by_a_whole_factor(shape: tuple[int, int], factor: int, tmp_path: Path) -> None:
    values = np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape)
    found = made(Picture(values, "picture", Path("x.png"), white=255), np.zeros(shape, np.uint8), 1)
    shown = overlay(found, {"lesion": [1]}, tmp_path)
    assert shown.shape[1] == shape[0] * factor and shown.shape[0] > shape[1] * factor


def test_a_slice_of_a_volume_has_the_proportions_of_the_body(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 40, 3)).astype(np.float32)
    image = load_picture(nifti(tmp_path / "v.nii.gz", values, np.diag([6.0, 3.0, 5.0, 1.0])))
    label = np.zeros(values.shape, np.uint8)
    label[5:9, 5:9, 1] = 1
    shown = overlay(made(image, label, 1), {"lesion": [1]}, tmp_path)
    assert shown.shape[1] == 400 and (shown == colour_of(1)).all(axis=-1).any()


def infer(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["infer", *map(str, words)])


def test_infer_writes_a_picture_as_pictures_and_counts_pixels(model: Path, photo: Picture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = infer(photo.source, "--model", model, "--out", out, "--probabilities", "--overlay", "--mask", "white")
    assert done.exit_code == 0 and "pixels" in done.output and "voxels" not in done.output, done.output
    names = ["photo_lesion.png", "photo_lesion_overlay.png", "photo_lesion_probability.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    mask, probability = (load_picture(out / name).values for name in (names[0], names[2]))
    assert found_values(mask) == [0, 255]
    np.testing.assert_array_equal(mask == 255, probability > 65535 / 2)
    done = infer(photo.source, "--model", model, "--out", tmp_path / "new", "--probabilities", "--force")
    (tmp_path / "new" / "photo_lesion.png").unlink()
    done = infer(photo.source, "--model", model, "--out", tmp_path / "new", "--probabilities")
    assert isinstance(done.exception, PFedSAMError) and "photo_lesion_probability.png" in str(done.exception)


def test_infer_finds_the_model_of_a_site_in_a_run(model: Path, photo: Picture, tmp_path: Path) -> None:
    for site in ("north", "south"):
        folder = tmp_path / "run" / "state" / "f" / site / f"b-{'ab' * 6}"
        folder.mkdir(parents=True)
        shutil.copy(model, folder / "state.safetensors")
    run = ("--run", tmp_path / "run")
    done = infer(photo.source, *run, "--site", "south", "--out", tmp_path / "out")
    assert done.exit_code == 0 and f"{tmp_path}/run/state/f/south" in done.output, done.output
    assert (tmp_path / "out" / "photo_lesion.png").is_file()
    without = infer(photo.source, *run, "--out", tmp_path / "other")
    assert "north, south" in str(without.exception)
    assert infer(photo.source, "--model", model, *run).exit_code == infer(photo.source).exit_code == 2
