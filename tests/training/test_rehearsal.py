"""`validate` says that a site can train only if its first cases were loaded as training loads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from image_files import head, nifti
from PIL import Image
from typer.testing import CliRunner

from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.bundles import BUNDLES_VARIABLE, find_bundle
from pfedsam.cli import app
from pfedsam.data.splitting import write_datalist
from pfedsam.training import rehearsal


def validate(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["validate", *map(str, words)], env={"COLUMNS": "400"})
    return done.exit_code, done.output


@pytest.mark.parametrize(("bundle", "suffix"), [("brain_lesion_mri", ".tif"), ("fundus_disc_cup", ".png")])
def test_pictures_train_in_both_kinds_of_bundle(tmp_path: Path, bundle: str, suffix: str) -> None:
    classes, colour = (2, True) if bundle == "fundus_disc_cup" else (1, False)
    for kind in ("images", "labels"):
        (tmp_path / "s" / kind).mkdir(parents=True)
    for case in range(3):
        values = head((30, 24, 3), case)[..., 1].T.astype(np.uint8)
        image = np.stack([values] * 3, -1) if colour else values
        label = sum((values > level).astype(np.uint8) for level in (90, 140)[:classes])
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "s" / "images" / f"q{case}{suffix}")
        Image.fromarray(np.ascontiguousarray(label)).save(tmp_path / "s" / "labels" / f"q{case}{suffix}")
    write_datalist(tmp_path / "s")
    code, text = validate(tmp_path / "s", "--bundle", bundle, "--set", "image_size=64")
    assert code == 0 and "the site can train" in text, text
    assert f"training: image (1, 3, 64, 64), label (1, {classes}, 64, 64)" in text and "validation: image" in text


def test_what_was_not_loaded_is_not_called_trainable(tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "s", 1, rgb=False)
    code, text = validate(site, "--quick")
    assert code == 0 and "can train" not in text and "no case was loaded" in text
    code, text = validate(site, "--labels", "0,1,2")
    assert code == 0 and "can train" not in text and "--labels" in text


def test_a_fault_of_the_transforms_is_an_error_of_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of one's own whose transforms cannot take what passes the checks."""
    own = tmp_path / "own" / "mine" / "configs"
    own.mkdir(parents=True)
    source = find_bundle("brain_lesion_mri") / "configs"
    config = json.loads((source / "train.json").read_text())
    broken = {"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image.reshape(1, 2, 3)"}
    for part in ("train", "validate"):
        config[part]["deterministic_transforms"].insert(1, broken)
    (own / "train.json").write_text(json.dumps(config))
    (own / "metadata.json").write_text((source / "metadata.json").read_text())
    monkeypatch.setenv(BUNDLES_VARIABLE, str(tmp_path / "own"))
    code, text = validate(tiny_site(tmp_path / "s", 1, rgb=False), "--bundle", "mine")
    assert code == 1 and "E05" in text and "passes the checks, but bundle 'mine' cannot load it" in text
    assert "shape" in text and "Traceback" not in text


def test_a_case_whose_label_is_not_seen_is_not_the_one_that_is_tried(tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "s", 1, rgb=False)
    far = np.zeros((300, 300, 3), np.uint8)
    far[5:9, 5:9] = 1
    nifti(site / "images" / "a_far.nii.gz", head((300, 300, 3)))
    nifti(site / "labels" / "a_far.nii.gz", far)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (site / "images").iterdir())
    listed = {"training": names[:5], "validation": names[5:6], "test": names[6:]}
    (site / "datalist.json").write_text(json.dumps(listed))
    code, text = validate(site)
    assert names[0] == "a_far" and code == 0 and "'a_far': 48 labelled voxels, 100%" in text, text


def test_names_and_settings_that_a_configuration_might_misread(tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "s $1 @2", 1, rgb=False)
    for kind in ("images", "labels"):
        for path in sorted((site / kind).iterdir()):
            path.rename(path.with_name(path.name.replace("tiny", "sub@1%'")))
    (site / "datalist.json").unlink()
    write_datalist(site)
    code, text = validate(site)
    assert code == 0 and "the site can train" in text, text
    done = CliRunner().invoke(app, ["validate", str(site), "--set", "field_of_view_mm=-5"])
    assert "E18" in str(done.exception) and "'field_of_view_mm' is -5" in str(done.exception)
    assert validate(site, "--labels", "0,abc")[0] == 2


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    code, text = validate(tiny_site(tmp_path / "s", 1, rgb=False), "--json")
    report = json.loads(text)
    assert code == 0 and report["ok"] and len(report["loaded"]) == 2
    assert nibabel.load(tmp_path / "s" / "images" / "tiny0.nii.gz").shape == tuple(report["cases"][0]["shape"])


def test_a_loading_that_hangs_or_is_killed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LIMIT_SECONDS", 0.01)
    code, text = validate(tiny_site(tmp_path / "s", 1, rgb=False))
    assert code == 1 and "took longer than 0.01 s" in text and "--quick" in text
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "false")
    code, text = validate(tmp_path / "s")
    assert code == 1 and "ended with code 1" in text
