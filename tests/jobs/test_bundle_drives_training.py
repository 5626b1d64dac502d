"""The learner owns no data pipeline: a changed transform in the bundle changes what a site sends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from simulated import BUNDLE, TINY, Job

from pfedsam import bundles
from pfedsam.parameters import shared_state
from pfedsam.training.round_result import RoundResult
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy


def one_round(root: Path, site: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> RoundResult:
    """A round of the main job's strategy with the bundles below `root`."""
    with monkeypatch.context() as patch:
        patch.setattr(bundles, "folder", lambda kind: root)
        strategy = Strategy.of(Job().plan["strategy"])
        local = SiteTrainer(BUNDLE, site, strategy, TINY, out)
        local.open()
        local.receive(shared_state(local.network, strategy.roles), local.fingerprint)
        return local.train(0)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(bundles.folder("bundles"), tmp_path / "bundles")
    return tmp_path / "bundles"


def change_transform(root: Path) -> None:
    path = root / BUNDLE / "configs" / "train.json"
    config = json.loads(path.read_text())
    transforms = config["train"]["deterministic_transforms"]
    (scale,) = (one for one in transforms if one["_target_"] == "pfedsam.data.transforms.IntensityWindowd")
    scale["upper"] = 90.0
    path.write_text(json.dumps(config))


def test_a_changed_transform_changes_the_delta_and_the_same_bundle_gives_the_same(
    federation: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = federation / "site-1"
    original = one_round(bundles.folder("bundles"), site, tmp_path / "a", monkeypatch)
    same = one_round(copied, site, tmp_path / "b", monkeypatch)
    for part in ("delta", "personal"):
        first, second = getattr(original, part), getattr(same, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    change_transform(copied)
    changed = one_round(copied, site, tmp_path / "c", monkeypatch)
    for part in ("delta", "personal"):
        first, second = getattr(original, part), getattr(changed, part)
        assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_round_trains_something(federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = one_round(bundles.folder("bundles"), federation / "site-1", tmp_path, monkeypatch)
    assert all(report.steps for report in result.phases.values())
    assert any(bool(tensor.abs().max() > 0) for tensor in result.delta.values())
