"""A new bundle for grey pictures, for classes that mirror each other, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from typer.testing import CliRunner

from pfedsam.bundle_tools.explain import explained
from pfedsam.bundle_tools.mirroring import mirrors, name_sides
from pfedsam.bundle_tools.new import new_bundle
from pfedsam.bundles import folder
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError

LUNGS = ["lung_left", "lung_right"]
SHIPPED = sorted(path.parent.parent for path in folder("bundles").glob("*/configs/metadata.json"))


def training(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "configs" / "train.json").read_text())
    return content


def sides(root: Path, draws: int = 12) -> set[bool]:
    """Whether class 1 lies left of class 2 in training images of a label in which it does."""
    parser = ConfigParser(training(root))
    parser["image_size"] = 64
    augment = parser.get_parsed_content("train#augmentation")
    label = torch.zeros(2, 64, 64)
    label[0, 10:20, 20:40], label[1, 44:54, 20:40] = 1, 1
    found = set()
    for seed in range(draws):
        augment.set_random_state(seed=seed)
        out = np.asarray(augment({"image": label.sum(0, keepdim=True).repeat(3, 1, 1), "label": label})["label"])
        first, second = (np.argwhere(channel > 0.5)[:, 0].mean() for channel in out)
        found.add(bool(first < second))
    return found


@pytest.mark.parametrize("modality", ["mri", "grey", "rgb"])
def test_classes_that_mirror_each_other_never_change_sides_in_training(modality: Any, tmp_path: Path) -> None:
    plain = new_bundle("plain", LUNGS, modality, tmp_path)
    mirrored = new_bundle("mirrored", LUNGS, modality, tmp_path, mirrored=True)
    assert sides(plain) == {True, False} and sides(mirrored) == {True}
    assert mirrors(training(plain)) and not mirrors(training(mirrored))
    kept = [step for step in training(plain)["train"]["random_transforms"] if "Flip" not in step["_target_"]]
    assert training(mirrored)["train"]["random_transforms"] == kept


@pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)
def test_no_shipped_bundle_mirrors_classes_that_mirror_each_other(root: Path) -> None:
    content = training(root)
    assert not (mirrors(content) and name_sides(content["class_names"]))


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (LUNGS, [("lung_left", "lung_right")]),
        (["Left_Kidney", "Right_Kidney", "l_lung", "r_lung"], [("Left_Kidney", "Right_Kidney"), ("l_lung", "r_lung")]),
        (["left_atrium", "right_ventricle", "leftover", "rightover", "lesion"], []),
    ],
)
def test_sides_are_seen_in_the_names(names: list[str], pairs: list[tuple[str, str]]) -> None:
    assert name_sides(names) == pairs


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ({"_target_": "RandFlipd", "spatial_axis": 0}, True),
        ({"_target_": "RandFlipd", "spatial_axis": None}, True),
        ({"_target_": "monai.transforms.Flipd", "spatial_axis": [1, 0]}, True),
        ({"_target_": "RandAxisFlipd"}, True),
        ({"_target_": "RandFlipd", "spatial_axis": 1}, False),
        ({"_target_": "RandFlipd", "spatial_axis": 0, "prob": 0}, False),
        ({"_target_": "RandAffined"}, False),
    ],
)
def test_every_step_that_mirrors_left_to_right_is_found(step: dict[str, Any], found: bool) -> None:
    assert bool(mirrors({"train": {"random_transforms": [step]}})) is found


def test_a_bundle_for_grey_pictures_takes_pictures_and_scales_them_by_themselves(tmp_path: Path) -> None:
    root = new_bundle("chest", ["nodule"], "grey", tmp_path)
    texts = {path.name: path.read_text() for path in (root / "configs").iterdir()}
    for name in ("train.json", "inference.json"):
        assert "IntensityWindowd" in texts[name] and "ScaleIntensityRanged" not in texts[name]
        assert '"colour": true' in texts[name]
    assert "fundus" not in " ".join([*texts.values(), (root / "docs" / "README.md").read_text()]).lower().replace(
        "fundus image segmentation", ""
    )


def test_the_explanation_is_that_of_the_files(tmp_path: Path) -> None:
    lungs = "\n".join(explained(new_bundle("lungs", LUNGS, "grey", tmp_path, mirrored=True)))
    for words in ("0 background, 1 lung_left, 2 lung_right", "not mirrored", "20 degrees", "PNG", "image_size 128"):
        assert words in lungs
    assert "field_of_view_mm" not in lungs
    root = new_bundle("liver", ["liver"], "mri", tmp_path)
    content = training(root)
    content["image_size"], content["field_of_view_mm"] = 96, 400.0
    (root / "configs" / "train.json").write_text(json.dumps(content))
    liver = "\n".join(explained(root))
    for words in ("mirrored left to right", "96 x 96 pixels", "field_of_view_mm 400", str(root / "configs"), "volumes"):
        assert words in liver
    assert "not mirrored" not in liver


def told(tmp_path: Path, name: str, classes: str, *words: str) -> tuple[str, bool]:
    """What the command says, and whether the bundle mirrors its training images."""
    line = ["new-bundle", name, "--classes", classes, "--modality", "grey", "--out", str(tmp_path), *words]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    return done.output, bool(mirrors(training(tmp_path / name)))


def test_the_command_goes_by_the_names_by_the_option_or_says_what_it_takes(tmp_path: Path) -> None:
    said, mirrored = told(tmp_path, "a", "lung_left,lung_right")
    assert "lung_left and lung_right" in said and "--no-mirrored" in said and not mirrored
    assert told(tmp_path, "b", "lung_left,lung_right", "--no-mirrored")[1]
    said, mirrored = told(tmp_path, "c", "femur,tibia")
    assert "(else: --mirrored)" in said and mirrored
    assert not told(tmp_path, "d", "femur,tibia", "--mirrored")[1]
    for name, classes, words in (("e", "nodule", ()), ("f", "disc,cup", ("--nested",))):
        said, mirrored = told(tmp_path, name, classes, *words)
        assert "else" not in said and mirrored
    done = CliRunner().invoke(app, ["new-bundle", "g", "--classes", "a,a", "--out", str(tmp_path)])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E16"
