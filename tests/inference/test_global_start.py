"""A new site starts from whatever a federation has left, with its bundle and settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BUNDLE, TINY
from typer.testing import CliRunner

from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.bundles import network_of
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.inference.global_start import GLOBAL_MODEL, find_start
from pfedsam.parameters import Manifest, Roles, manifest
from pfedsam.storage.global_model import write_global_model
from pfedsam.storage.site_model import read, write


@pytest.fixture(scope="module")
def expected() -> Manifest:
    return manifest(network_of(BUNDLE, TINY, weights=False), Roles(), "shared")


@pytest.fixture
def run(model: Path, expected: Manifest, tmp_path: Path) -> Path:
    """What `simulate` leaves, as far as it matters here."""
    kept = read(model)
    write_global_model(tmp_path / GLOBAL_MODEL, kept.shared, kept.info["fingerprint"], expected, 2)
    state = tmp_path / "state" / "simulation" / "site-1" / f"{BUNDLE}-{kept.info['fingerprint'][:12]}"
    state.mkdir(parents=True)
    shutil.copy(model, state / "state.safetensors")
    return tmp_path


def test_a_run_its_global_model_and_a_state_in_it_are_one_start(run: Path, model: Path, expected: Manifest) -> None:
    state = next(run.rglob("state.safetensors"))
    told = {}
    for path in (run, run / GLOBAL_MODEL, state):
        start = find_start(path)
        theta, fingerprint = start.tensors(expected)
        told[path] = (start.bundle, start.overrides, fingerprint)
        assert all(torch.equal(theta[name], tensor) for name, tensor in read(model).shared.items())
    assert set(map(str, told.values())) == {str((BUNDLE, TINY, read(model).info["fingerprint"]))}
    assert (find_start(run).round, find_start(state).round) == (2, 3)


def test_beside_the_plan_of_its_job_a_global_model_has_the_plans_bundle(run: Path, tmp_path: Path) -> None:
    app_folder = tmp_path / "app_server"
    (app_folder / "config").mkdir(parents=True)
    shutil.copy(run / GLOBAL_MODEL, app_folder)
    assert find_start(app_folder / GLOBAL_MODEL).bundle is None
    server = {"components": [{"id": "plan", "path": "x"}]}
    (app_folder / "config" / "config_fed_server.json").write_text(json.dumps(server))
    (app_folder / "config" / "plan.json").write_text(json.dumps({"bundle": BUNDLE, "overrides": TINY}))
    start = find_start(app_folder / GLOBAL_MODEL)
    assert (start.bundle, start.overrides) == (BUNDLE, TINY)


def test_what_is_no_global_model_is_refused(run: Path, model: Path, tmp_path: Path, expected: Manifest) -> None:
    with pytest.raises(PFedSAMError, match=r"E10.*none\.safetensors.*simulate"):
        find_start(tmp_path / "none.safetensors")
    alone = read(model)
    alone.shared = {}
    write(tmp_path / "alone.safetensors", alone)
    with pytest.raises(PFedSAMError, match=r"E32.*shares nothing"):
        find_start(tmp_path / "alone.safetensors")
    other = manifest(network_of(BUNDLE, {**TINY, "lora_rank": 4}, weights=False), Roles(), "shared")
    with pytest.raises(PFedSAMError, match="E12"):
        find_start(next(run.rglob("state.safetensors"))).tensors(other)


def personalised(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["personalize", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.mark.slow
def test_a_personal_model_has_the_bundle_and_the_settings_of_the_run(run: Path, tmp_path: Path) -> None:
    site, out = tiny_site(tmp_path / "site", 1, rgb=False), tmp_path / "own"
    told = personalised(site, "--global", run, "--out", out, "--set", "augmentations=1")
    info = read(out / "model.safetensors").info
    assert info["bundle"] == BUNDLE and TINY.items() <= info["overrides"].items()
    assert f"bundle {BUNDLE}" in told and "image_size 64" in told


def test_a_global_model_that_names_no_bundle_is_refused_until_one_is_given(run: Path, tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "site", 1, rgb=False)
    alone = tmp_path / "elsewhere" / GLOBAL_MODEL
    alone.parent.mkdir()
    shutil.copy(run / GLOBAL_MODEL, alone)
    with pytest.raises(PFedSAMError, match=r"E33.*--bundle"):
        personalised(site, "--global", alone, "--out", tmp_path / "own")
    # the settings are not known either, so that it is another network
    with pytest.raises(PFedSAMError, match=r"E1[12]"):
        personalised(site, "--global", alone, "--out", tmp_path / "own", "--bundle", BUNDLE, "--set", "image_size=64")


@pytest.mark.parametrize(("strategy", "word"), [("fedavg_lora", "no final phase"), ("pfedsam", "experts=0")])
def test_a_strategy_that_would_train_nothing_is_refused(run: Path, tmp_path: Path, strategy: str, word: str) -> None:
    site = tiny_site(tmp_path / "site", 1, rgb=False)
    words = ("--global", run, "--out", tmp_path / "own", "--strategy", strategy, "--set", "experts=0")
    with pytest.raises(PFedSAMError, match=rf"E32.*{word}"):
        personalised(site, *words)


def test_volumes_for_a_bundle_of_pictures_are_one_sentence(run: Path, tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "site", 1, rgb=False)
    words = ("--global", run, "--out", tmp_path / "own", "--bundle", "fundus_disc_cup")
    with pytest.raises(PFedSAMError, match=r"E05.*is a volume, and the bundle takes pictures.*--bundle") as caught:
        personalised(site, *words)
    assert "\n" not in str(caught.value)
