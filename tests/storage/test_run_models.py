"""Which model is meant where a run has left several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedsam.errors import PFedSAMError
from pfedsam.storage.run_models import find_run_model, trainings_of
from pfedsam.storage.site_model import SiteModel, write

EXPERTS = {"shared": ["lora_a"], "personal": ["experts"]}


def keep(path: Path, number: int = 1, roles: dict[str, list[str]] = EXPERTS) -> Path:
    info = {"fingerprint": "ab" * 32, "roles": roles, "round": number, "final": True}
    write(path, SiteModel({"a": torch.ones(1)}, {"b": torch.ones(1)}, info=info))
    return path


def training(out: Path, name: str, strategy: str, seed: int, roles: dict[str, list[str]] = EXPERTS) -> Path:
    """The folder of a training of two sites, with the models of rounds 9 and 10."""
    folder = out / "trainings" / name
    for number in (9, 10):
        for site in ("north", "south"):
            keep(folder / "models" / str(number) / f"{site}.safetensors", number, roles)
    told: dict[str, Any] = {"strategy": strategy, "seed": seed, "held_out": None}
    (folder / "training.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    training(tmp_path, "k1", "pfedsam", 0)
    training(tmp_path, "k2", "pfedsam", 1)
    training(tmp_path, "k3", "local_only", 1, {"shared": [], "personal": ["lora_a"]})
    return tmp_path


def refused(path: Path, *which: Any, **how: Any) -> str:
    with pytest.raises(PFedSAMError) as caught:
        find_run_model(path, *which, **how)
    return str(caught.value)


def test_the_newest_model_of_the_site_strategy_and_seed_is_found(comparison: Path) -> None:
    file = comparison / "trainings" / "k2" / "models" / "10" / "south.safetensors"
    assert find_run_model(comparison, "south", "pfedsam", 1) == (file, "south")
    assert find_run_model(file.parents[2], "south") == (file, "south")


def test_what_is_not_named_and_not_clear_is_refused_with_what_there_is(comparison: Path) -> None:
    said = refused(comparison, "south")
    assert "E13" in said and all(name in said for name in ("pfedsam, seed 0", "pfedsam, seed 1", "local_only, seed 1"))
    assert "local_only" not in refused(comparison, "south", "pfedsam")
    assert "no such training" in refused(comparison, "south", "pfedsam", 5)
    for site in (None, "east"):
        assert "north, south" in refused(comparison, site, "pfedsam", 1)


def test_the_global_model_needs_no_site_where_all_sites_share_it(comparison: Path) -> None:
    assert find_run_model(comparison, None, "pfedsam", 0, shared=True)[0].parts[-4] == "k1"
    assert "north, south" in refused(comparison, None, "local_only", shared=True)


def test_a_file_and_a_state_root_are_found_as_before_and_have_no_strategy(tmp_path: Path) -> None:
    file = keep(tmp_path / "state" / "f" / "north" / f"b-{'ab' * 6}" / "state.safetensors")
    assert trainings_of(tmp_path) == []
    assert find_run_model(tmp_path, "north") == (file, "north") and find_run_model(file)[0] == file
    assert "E32" in refused(tmp_path, "north", "pfedsam") and "E32" in refused(file, None, None, 0)


def test_a_training_of_the_simulator_has_its_models_in_a_state_root(tmp_path: Path) -> None:
    folder = tmp_path / "trainings" / "k"
    file = keep(folder / "state" / "comparison" / "north" / f"b-{'ab' * 6}" / "state.safetensors")
    (folder / "training.json").write_text(json.dumps({"strategy": "pfedsam", "seed": 0, "held_out": None}))
    assert find_run_model(tmp_path) == (file, "north")
    (folder / "training.json").write_text("{}")
    assert "E29" in refused(tmp_path)
