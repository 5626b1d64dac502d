"""Federations in one process: rounds that several strategies share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedsam.data.phantom import write_phantom
from pfedsam.site_model import read
from pfedsam.strategies import find_strategy
from pfedsam.training.federation import Federation, run_federation

SITES, ROUNDS = ("site-1", "site-2"), 2
TINY = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "data"
    write_phantom(folder, sites=len(SITES), cases=6, shape=(32, 32, 6))
    return folder


def federation(data: Path, out: Path, name: str = "pfedsam") -> Federation:
    file = find_strategy(name)
    sites = {site: data / site for site in SITES}
    return Federation("brain_lesion_mri", sites, file.checked(), out, ROUNDS, {**TINY, **file.overrides})


def test_rounds_apart_give_what_the_whole_gives(data: Path, tmp_path: Path) -> None:
    whole, parted = federation(data, tmp_path / "whole"), federation(data, tmp_path / "parted")
    run_federation(whole)
    parted.begun = parted.rounds_alone(tmp_path / "rounds")
    assert parted.begun is not None
    run_federation(parted)
    first, _ = whole.global_model()
    second, rounds = parted.global_model()
    assert rounds == ROUNDS and first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    for site in SITES:
        mine, theirs = read(whole.model_of(site)), read(parted.model_of(site))
        assert mine.personal and mine.personal.keys() == theirs.personal.keys()
        for name, tensor in mine.personal.items():
            torch.testing.assert_close(theirs.personal[name], tensor, rtol=0, atol=1e-5)
        assert theirs.info["final"] and theirs.info["round"] == ROUNDS
    notes = [(note["round"], note["site"], len(note["phases"])) for note in parted.history()]
    assert notes == [(note["round"], note["site"], len(note["phases"])) for note in whole.history()]


def test_another_strategy_goes_on_from_the_same_rounds(data: Path, tmp_path: Path) -> None:
    ours, theirs = federation(data, tmp_path / "a"), federation(data, tmp_path / "b", "fedavg_lora_ft")
    ours.begun, theirs.begun = (one.rounds_alone(tmp_path / "rounds") for one in (ours, theirs))
    assert ours.begun is not None and theirs.begun is not None and ours.begun.out == theirs.begun.out
    run_federation(ours)
    before = (ours.begun.out / "history.jsonl").read_bytes()
    run_federation(theirs)
    assert (ours.begun.out / "history.jsonl").read_bytes() == before, "done once"
    model = read(theirs.model_of(SITES[0]))
    assert model.copy and any(not tensor.equal(model.shared[name]) for name, tensor in model.copy.items())


@pytest.mark.parametrize("name", ["feddpa", "ditto", "fedrep", "fedsa", "local_phase_each_round", "distil_mutual"])
def test_rounds_with_something_personal_stand_for_themselves(name: str, data: Path, tmp_path: Path) -> None:
    assert federation(data, tmp_path, name).rounds_alone(tmp_path / "rounds") is None
