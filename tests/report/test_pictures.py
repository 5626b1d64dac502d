"""The pictures of a case: each panel shows one thing, and what is not there is not drawn. Compared by pixels."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from pfedsam.data.picture import Picture
from pfedsam.evaluation.difference import difference
from pfedsam.evaluation.panels import planes_of
from pfedsam.evaluation.pictures import DIFFERENCE, case_figure, case_picture, class_style
from pfedsam.evaluation.site import CasePrediction, CaseScore, SiteEvaluation

SECRET = "patient-4711"
#: What eyes without one kind of cone see of linear red, green and blue (Machado et al., 2009, severity 1).
EYES = {
    "usual": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def evaluation(
    label: np.ndarray, dice: dict[str, tuple[float, ...]], names: tuple[str, ...], **found: np.ndarray
) -> SiteEvaluation:
    """One case, `(C, x, y, z)`, as an example of its site."""
    ones = (1.0,) * len(names)
    scores = [
        CaseScore("site-1", SECRET, model, dice[model], ones, ones, ones, (False,) * len(names)) for model in found
    ]
    shown = CasePrediction(SECRET, Path("image"), label, found)
    return SiteEvaluation("site-1", scores, {"worst": shown}, class_names=names)


def block(shape: tuple[int, ...], *ranges: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[ranges] = True
    return mask


def photograph(nothing: bool = True) -> tuple[SiteEvaluation, Picture]:
    """A disc with a cup; the global model finds neither, the personal one both, a bit beside."""
    disc, cup = (block((40, 30, 1), slice(*x), slice(*y)) for x, y in (((10, 24), (8, 20)), ((14, 18), (12, 16))))
    label = np.stack([disc, cup])
    dice = {"global": (0.0, 0.0), "personal": (0.8, 0.5)}
    models = {"global": label & (not nothing), "personal": np.roll(label, 2, 1)}
    values = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    return evaluation(label, dice, ("disc", "cup"), **models), Picture(values, "picture", Path("image"))


def volume() -> tuple[SiteEvaluation, Picture]:
    """A lesion in slices 4 to 9 of 12; the global model finds something in slice 12 only."""
    lesion = block((1, 24, 24, 12), slice(0, 1), slice(6, 14), slice(6, 14), slice(3, 9))
    elsewhere = block(lesion.shape, slice(0, 1), slice(2, 4), slice(2, 4), slice(11, 12))
    dice = {"global": (0.0,), "personal": (1.0,)}
    values = np.random.default_rng(0).uniform(size=lesion.shape[1:])
    found = evaluation(lesion, dice, ("lesion",), **{"global": elsewhere, "personal": lesion})
    return found, Picture(values, "volume", Path("image"), affine=np.diag([1.0, 1.0, 3.0, 1.0]))


def pixels(figure: Figure) -> dict[str, np.ndarray]:
    """What is inside of each panel, by its label."""
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    panels = {}
    for axes in figure.axes:
        left, bottom, right, top = np.rint(axes.get_window_extent().extents).astype(int)
        panels[axes.get_label()] = drawn[len(drawn) - top : len(drawn) - bottom, left:right]
    return panels


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two panels look the same; places of lines are not whole pixels, so the last digit may differ."""
    return bool((np.abs(one.astype(int) - other) <= 2).all())


def texts(figure: Figure) -> list[str]:
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [text.get_text() for text in figure.texts] + legends


def test_the_panel_of_an_empty_prediction_is_the_image_alone() -> None:
    panels = pixels(case_figure(photograph()[0], "worst", photograph()[1]))
    assert np.array_equal(panels["global"], panels["image"])
    assert not np.array_equal(panels["personal"], panels["image"])
    assert not np.array_equal(panels["truth"], panels["image"])
    right = pixels(case_figure(photograph(nothing=False)[0], "worst", photograph()[1]))
    assert not np.array_equal(right["global"], right["image"])


def test_a_prediction_that_is_right_looks_as_the_truth_and_no_panel_shows_both() -> None:
    panels = pixels(case_figure(photograph(nothing=False)[0], "worst", photograph()[1]))
    assert same(panels["global"], panels["truth"])
    assert not same(panels["personal"], panels["truth"])


def test_a_picture_has_six_panels_with_names_and_dice_and_no_slice() -> None:
    found, image = photograph()
    figure = case_figure(found, "worst", image)
    labels = ["image", "global", "personal", "truth", "global difference", "personal difference"]
    assert [axes.get_label() for axes in figure.axes] == labels
    told = texts(figure)
    assert "global: Dice 0.00, nothing found\ndisc 0.00, cup 0.00" in told and "nothing found here" in told
    assert "personal: Dice 0.65\ndisc 0.80, cup 0.50" in told
    assert {"disc", "cup"} <= set(told) and any("missed:" in text for text in told)
    assert not any("slice" in text or "volume" in text for text in told)


def test_a_volume_has_its_slices_below_each_other_also_one_where_only_a_model_finds_something() -> None:
    found, image = volume()
    assert planes_of(found.examples["worst"]) == [3, 5, 11]
    figure = case_figure(found, "worst", image)
    told = texts(figure)
    assert {"slice 4 of 12", "slice 6 of 12", "slice 12 of 12", "no truth here"} <= set(told)
    panels = pixels(figure)
    assert len(panels) == 18
    assert np.array_equal(panels["global 0"], panels["image 0"])
    assert not np.array_equal(panels["global 2"], panels["image 2"])
    assert np.array_equal(panels["personal 2"], panels["image 2"])


def test_slices_of_a_case_without_any_truth_are_those_where_something_was_found() -> None:
    found, _ = volume()
    shown = found.examples["worst"]
    nothing = CasePrediction(SECRET, Path("image"), shown.label & False, {"global": shown.predictions["global"]})
    assert planes_of(nothing) == [11]
    assert planes_of(CasePrediction(SECRET, Path("image"), nothing.label, {"global": nothing.label})) == [6]


def test_found_missed_and_wrong_are_all_there_is_and_do_not_overlap() -> None:
    random = np.random.default_rng(0)
    truth, told = (random.integers(0, 3, (20, 20)) for _ in range(2))
    areas = difference(*(np.stack([numbers == 1, numbers == 2]) for numbers in (truth, told)))
    assert np.array_equal(areas["found"], (truth == told) & (truth > 0))
    assert np.array_equal(areas["missed"], (truth > 0) & (told == 0))
    assert np.array_equal(areas["wrong"], (told > 0) & (told != truth))


@pytest.mark.parametrize("eyes", EYES)
def test_what_was_found_missed_and_wrong_is_told_apart_by_all_eyes(eyes: str) -> None:
    seen = {}
    for name, (colour, _, _) in DIFFERENCE.items():
        linear = np.array(to_rgb(colour)) ** 2.2
        seen[name] = np.clip(np.asarray(EYES[eyes]) @ linear, 0, 1) ** (1 / 2.2)
    for one, other in combinations(seen, 2):
        assert np.abs(seen[one] - seen[other]).max() > 0.15, f"{one} and {other}"
    textures = [hatch for _, hatch, _ in DIFFERENCE.values()]
    assert len(set(textures)) == len(textures)


def test_no_two_of_sixteen_classes_have_the_same_colour_and_line() -> None:
    assert len({class_style(number) for number in range(16)}) == 16
    assert all(class_style(n)[1] != class_style(n + 1)[1] for n in range(7))


def test_the_panels_of_two_classes_that_changed_places_differ() -> None:
    _, image = photograph()
    label = np.stack([block((40, 30, 1), slice(x, x + 8), slice(8, 20)) for x in (5, 25)])
    dice = {"global": (0.0, 0.0), "personal": (1.0, 1.0)}
    swapped = evaluation(label, dice, ("left", "right"), **{"global": label[::-1], "personal": label})
    panels = pixels(case_figure(swapped, "worst", image))
    assert not same(panels["global"], panels["truth"])
    assert same(panels["personal"], panels["truth"])


@pytest.mark.parametrize("shape", [(5, 4), (300, 20), (2500, 40)], ids=["tiny", "long", "large"])
def test_one_pixel_is_seen_in_a_picture_of_any_size(shape: tuple[int, int]) -> None:
    label = block((1, *shape, 1), slice(0, 1), slice(2, 3), slice(2, 3))
    dice = {"personal": (0.0,)}
    found = evaluation(label, dice, ("lesion",), personal=label & False)
    image = Picture(np.zeros(shape), "picture", Path("image"))
    panels = pixels(case_figure(found, "worst", image))
    assert set(panels) == {"image", "truth", "personal", "personal difference"}
    changed = (panels["truth"] != panels["image"]).any(-1).sum()
    assert changed >= 4
    assert np.array_equal(panels["personal"], panels["image"])


def test_the_file_is_the_owners_and_says_in_words_what_it_shows_but_not_whom(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "site-1-worst.png"
    case_picture(volume()[0], "worst", volume()[1], path)
    assert path.stat().st_mode & 0o777 == 0o600
    with Image.open(path) as picture:
        words = picture.info["Description"]
    assert words.startswith("site-1, worst test case. Global model: Dice lesion 0.00; 0 found, 384 missed, 4 wrong")
    assert words.endswith("Slices 4, 6, 12 of 12.")
    assert SECRET.encode() not in path.read_bytes()
    case_picture(photograph()[0], "worst", photograph()[1], path)
    with Image.open(path) as picture:
        words = picture.info["Description"]
    assert "pixels; nothing found" in words and "lice" not in words and "voxel" not in words
