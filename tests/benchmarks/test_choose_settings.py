"""Which choices of settings count as done, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import choose_settings
import pytest
from choose_settings import BUNDLE, CHOICES, FOLDS, ROUNDS, SETTINGS, chosen, federation_of, is_current, key, show

from pfedsam import bundles
from pfedsam.data.phantom import write_phantom
from pfedsam.evaluation.runs import Run

NAME = "pfedsam, learning rate 0.002"


def row(**changes: Any) -> dict[str, Any]:
    dice = {"global": {"site-1": 0.25}, "personal": {"site-1": 0.5}}
    return {
        "key": key(NAME, 1),
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
    file, strategy = chosen(name)
    assert strategy.phases and strategy.name == CHOICES[name][0]
    assert set(CHOICES[name][1].get("overrides", {})) <= set(file.overrides)


def test_no_two_choices_are_the_same() -> None:
    keys = {(name, fold): key(name, fold) for name in CHOICES for fold in FOLDS}
    assert len(set(keys.values())) == len(keys)
    assert keys == {(name, fold): key(name, fold) for name in CHOICES for fold in FOLDS}


@pytest.mark.parametrize("name", ["pfedsam", "fedavg_lora_ft"])
def test_a_choice_shares_its_rounds_with_the_comparison(name: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom(data, sites=2, cases=6, shape=(16, 16, 4))
    sites = {path.name: path for path in sorted(data.iterdir()) if path.is_dir()}
    run = Run(str(data), tuple(sites), BUNDLE, name, 1, ROUNDS, dict(SETTINGS))
    begun = federation_of(name, 1, sites, out).begun
    assert begun is not None and begun.out == run.shared_folder(out)
    other = federation_of(name, 2, sites, out).begun
    assert other is not None and other.out != begun.out


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
    other = {"key": key(NAME, 2), "fold": 2, "dice": {"global": {"site-1": 0.75}, "personal": {"site-1": 0.9}}}
    show([row(), row(**other)])
    shown = capsys.readouterr().out
    assert shown.count(NAME) == 1 and "1,2" in shown and "0.500" in shown and shown.count("0.700") == 2


def test_rows_that_are_checked_in_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in choose_settings.RESULTS.read_text().splitlines()]
    show(rows)
    shown = capsys.readouterr().out
    assert ("of older settings" in shown) == any(not is_current(one) for one in rows)
    older = [one for one in rows if not is_current(one)]
    assert all(f"{one['dice']['personal']['henry_ford']:.3f}" in shown for one in older)
