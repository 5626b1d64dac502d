"""Which choices of settings count as done, without a training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import choose_settings
import pytest
from choose_settings import (
    BUNDLE,
    CHOICES,
    FACTORS,
    FOLDS,
    PERSONAL,
    ROUNDS,
    SETTINGS,
    choice,
    is_current,
    over_cases,
    show,
)

from pfedsam import bundles
from pfedsam.comparison.run import Run
from pfedsam.data.phantom import write_phantom

NAME = "pfedsam, rates times 2"


def row(**changes: Any) -> dict[str, Any]:
    dice = {"global": {"site-1": 0.25}, "personal": {"site-1": 0.5}}
    return {
        "key": choice(NAME, 1).row_key,
        "choice": NAME,
        "fold": 1,
        "base": "pfedsam",
        "patch": {},
        "dice": dice,
        "seconds": 1.0,
        **changes,
    }


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_a_possible_strategy(name: str) -> None:
    base, patch, rounds = CHOICES[name]
    file = choice(name, 0).file
    assert file.checked().name == base
    assert choice(name, 0).rounds == (rounds or ROUNDS)
    assert set(patch.get("overrides", {})) <= set(file.overrides)


def test_no_two_choices_are_the_same() -> None:
    keys = {(name, fold): choice(name, fold).row_key for name in CHOICES for fold in FOLDS}
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("name", PERSONAL)
def test_a_personal_strategy_keeps_the_rate_of_what_is_shared(name: str) -> None:
    factor = FACTORS[0]
    before, after = (choice(one, 0).file.checked() for one in (name, f"{name}, rates times {factor:g}"))
    pairs = list(zip((*before.phases, *before.final), (*after.phases, *after.final), strict=True))
    ratios = {one.trains: other.learning_rate / one.learning_rate for one, other in pairs}
    assert all(ratio == (1 if trains == ("shared",) else factor) for trains, ratio in ratios.items())
    assert {("personal",), ("copy",)} & set(ratios)


@pytest.mark.parametrize("name", ["pfedsam", "fedavg_lora_ft", "ditto", "centralised"])
def test_a_choice_without_a_patch_is_the_training_of_the_comparison(name: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom(data, sites=2, cases=6, shape=(16, 16, 4))
    ours = choice(name, 1, data)
    run = Run(str(data), ours.sites, BUNDLE, name, 1, ROUNDS, dict(SETTINGS), aggregation="mean")
    assert ours.sites == ("site-1", "site-2")
    assert ours.training_folder(out) == run.training_folder(out)
    assert ours.shared_folder(out) == run.shared_folder(out)
    assert choice(name, 2, data).shared_folder(out) != run.shared_folder(out)
    other = choice(f"{name}, rates times 2", 1, data)
    assert other.training_folder(out) != run.training_folder(out)
    # the rounds are shared by what differs in the final phase only
    assert (other.shared_folder(out) == run.shared_folder(out)) == (name in ("pfedsam", "fedavg_lora_ft"))


def test_a_changed_setting_or_default_makes_a_choice_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = row()
    assert is_current(before)
    with monkeypatch.context() as patch:
        patch.setitem(SETTINGS, "augmentations", SETTINGS["augmentations"] + 1)
        assert not is_current(before)
    with monkeypatch.context() as patch:
        patch.setattr(choose_settings, "ROUNDS", choose_settings.ROUNDS + 1)
        assert not is_current(before)
    # a default of the bundle that no choice names
    configs = tmp_path / choose_settings.BUNDLE / "configs"
    configs.mkdir(parents=True)
    for file in (bundles.find_bundle(choose_settings.BUNDLE) / "configs").iterdir():
        (configs / file.name).write_bytes(file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(bundles, "find_bundle", lambda name: tmp_path / name)
        assert is_current(before)
        config = json.loads((configs / "train.json").read_text())
        config["bottleneck"] += 1
        (configs / "train.json").write_text(json.dumps(config))
        assert not is_current(before)
    assert is_current(before)


def test_rows_of_older_settings_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    keyless = {name: value for name, value in row().items() if name != "key"}
    show([keyless, row(key="0" * 16), row(choice="a choice that was taken out"), row()])
    now, older = capsys.readouterr().out.split("of older settings")
    assert now.count(NAME) == 1 and older.count(NAME) == 2
    assert "taken out" in older and "taken out" not in now


def test_folds_of_a_choice_are_one_line_of_means(capsys: pytest.CaptureFixture[str]) -> None:
    dice = {"global": {"site-1": 0.75}, "personal": {"site-1": 0.9}}
    show([row(), row(key=choice(NAME, 2).row_key, fold=2, dice=dice)])
    shown = capsys.readouterr().out
    assert shown.count(NAME) == 1 and "1,2" in shown and "0.500" in shown and shown.count("0.700") == 2


def test_the_mean_over_cases_weighs_a_site_by_its_cases() -> None:
    two = {"site-1": 0.25, "site-2": 0.75}
    told = row(dice={"global": two, "personal": two}, cases={"site-1": 3, "site-2": 1})
    assert over_cases(told, "global") == 0.375
    assert math.isnan(over_cases(row(), "global"))


@pytest.mark.parametrize("name", sorted(path.name for path in choose_settings.RESULTS.parent.glob("choices*.jsonl")))
def test_rows_that_are_checked_in_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in choose_settings.RESULTS.with_name(name).read_text().splitlines()]
    show(rows)
    shown = capsys.readouterr().out
    assert ("of older settings" in shown) == any(not is_current(one) for one in rows)
    older = [one["dice"]["personal"] for one in rows if not is_current(one)]
    assert all(f"{dice:.3f}" in shown for one in older for dice in one.values())
