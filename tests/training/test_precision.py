"""bfloat16 where it pays: measured, switched off aloud where it does not, and left alone where nobody asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedsam.data.phantom import write_phantom
from pfedsam.training import precision
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer

BUNDLE = "brain_lesion_mri"
TINY = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "augmentations": 1, "amp": True}


@pytest.mark.parametrize(("bfloat16", "float32", "pays"), [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_what_is_faster_pays(monkeypatch: pytest.MonkeyPatch, bfloat16: float, float32: float, pays: bool) -> None:
    monkeypatch.setattr(precision, "_seconds", {torch.bfloat16: bfloat16, torch.float32: float32}.__getitem__)
    precision.bfloat16_pays.cache_clear()
    assert precision.bfloat16_pays("cpu") is pays
    precision.bfloat16_pays.cache_clear()


def test_the_measurement_is_of_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(a.dtype) or real(a, b))
    assert 0 < precision._seconds(torch.bfloat16) < float("inf") and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("pays", [True, False])
def test_a_site_trains_in_bfloat16_where_it_pays_and_says_so_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pays: bool
) -> None:
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: pays)
    write_phantom(tmp_path, sites=1, cases=6, shape=(32, 32, 6))
    local = SiteTrainer(BUNDLE, tmp_path / "site-1", find_strategy("pfedsam").checked(), TINY, tmp_path / "out")
    local.open()
    assert local.trainer.autocast is pays and local.evaluator.inferer.amp is pays
    assert ("amp is off" in caplog.text) is not pays


def test_where_nobody_asks_for_bfloat16_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: pytest.fail("measured"))
    assert precision.slow_precision(BUNDLE, {"amp": False}) == {}
