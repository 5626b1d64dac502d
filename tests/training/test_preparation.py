"""How volumes are prepared for a site: what the key depends on, data that are read once, and the same training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import pfedsam.data.case_checks as case_checks
import pfedsam.data.loading as loading
from pfedsam.bundles import BUNDLES_VARIABLE, find_bundle
from pfedsam.data.phantom import write_phantom
from pfedsam.data.reader import load_picture
from pfedsam.parameters import shared_state
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.preparation import Preparation, require_trainable
from pfedsam.training.site import SiteTrainer

BUNDLE = "brain_lesion_mri"
TINY = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "positives_per_case": 2, "negatives_per_case": 1}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preparation")
    write_phantom(folder, sites=1, cases=6, shape=(32, 32, 6))
    return folder / "site-1"


def keys(folder: Path, bundle: str = BUNDLE, label_map: dict[str, str] | None = None, **overrides: object) -> list[str]:
    settings = Preparation(bundle, {**TINY, **overrides}, label_map, folder).settings()
    return [settings["train#dataset#kept"]["key"], settings["validate#dataset"]["kept"]["key"]]


def test_the_key_is_of_all_that_decides_the_volumes_and_of_nothing_else(tmp_path, monkeypatch) -> None:
    first = keys(tmp_path)
    assert first[0] != first[1]
    assert keys(tmp_path, batch_size=2, augmentations=2, lora_rank=4, seed=3) == first
    for other in (
        keys(tmp_path, image_size=64),
        keys(tmp_path, field_of_view_mm=200.0),
        keys(tmp_path, label_map={"7": "lesion"}),
    ):
        assert not set(other) & set(first)
    own = tmp_path / "bundles" / "own"
    shutil.copytree(find_bundle(BUNDLE), own)
    monkeypatch.setenv(BUNDLES_VARIABLE, str(own.parent))
    assert keys(tmp_path, "own") == first
    config = own / "configs" / "train.json"
    config.write_text(config.read_text().replace('"lower": 0.5', '"lower": 1.5'))
    assert not set(keys(tmp_path, "own")) & set(first)


def test_without_a_folder_nothing_is_kept_and_a_dataset_of_a_users_own_stays(tmp_path, monkeypatch) -> None:
    settings = Preparation(BUNDLE, TINY).settings()
    assert settings["train#dataset#kept"] is None and settings["validate#dataset"]["kept"] is None
    assert "cache_dir" not in settings and Preparation(BUNDLE, TINY, folder=tmp_path).settings()["cache_dir"]
    own = tmp_path / "bundles" / "own"
    shutil.copytree(find_bundle(BUNDLE), own)
    monkeypatch.setenv(BUNDLES_VARIABLE, str(own.parent))
    config = own / "configs" / "train.json"
    text = config.read_text().replace("pfedsam.data.slices.SliceDataset", "own.Slices")
    text = text.replace('"CacheDataset"', '"Dataset"').replace('"cache_dir": null', '"cache_dir": "features"')
    config.write_text(text)
    assert Preparation("own", TINY, folder=tmp_path).settings() == {}


def trained(site: Path, out: Path, prepared: Path | None) -> dict[str, torch.Tensor]:
    """Delta and validation Dice of a round."""
    file = find_strategy("pfedsam")
    local = SiteTrainer(BUNDLE, site, file.checked(), {**TINY, **file.overrides}, out, prepared=prepared)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    delta = local.train(0).delta
    return {**delta, "dice": torch.tensor(local.validate(experts=True)["val_dice"])}


def test_images_are_read_once_in_the_first_job_and_not_at_all_in_the_second(site, tmp_path, monkeypatch) -> None:
    read: list[Path] = []

    def noted(path: Path, label: bool = False):
        read.append(path)
        return load_picture(path, label)

    expected = trained(site, tmp_path / "without", None)
    for module in (case_checks, loading):
        monkeypatch.setattr(module, "load_picture", noted)
    files = sorted(path for kind in ("images", "labels") for path in (site / kind).iterdir())
    for job, wanted in (("first", files), ("second", [])):
        read.clear()
        require_trainable(site, BUNDLE, TINY, prepared=tmp_path / "prepared")
        found = trained(site, tmp_path / job, tmp_path / "prepared")
        assert sorted(read) == wanted
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
