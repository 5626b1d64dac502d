"""Few labels and scribbles: what is kept, what is open, and that nothing that is measured on changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fewer_labels import OPEN, scribbled
from PIL import Image

from pfedsam.data.checks import check_site
from pfedsam.data.sites import datalist, read_split
from pfedsam.data.splitting import write_datalist

SCRIPT = Path(__file__).parent / "fewer_labels.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A site of nine grey pictures with a black-and-white disc."""
    random, site = np.random.default_rng(0), tmp_path / "data" / "a"
    rows, columns = np.indices((40, 48))
    for kind in ("images", "labels"):
        (site / kind).mkdir(parents=True)
    for number in range(9):
        mask = ((rows - 18) ** 2 + (columns - 20 - number) ** 2 < 100).astype(np.uint8) * 255
        Image.fromarray(mask).save(site / "labels" / f"p{number}.png")
        Image.fromarray(random.integers(0, 255, mask.shape, dtype=np.uint8)).save(site / "images" / f"p{number}.png")
    write_datalist(site)
    return tmp_path / "data"


def make(data: Path, out: Path, *words: str) -> Path:
    subprocess.run([sys.executable, str(SCRIPT), str(data), str(out), *words], check=True, capture_output=True)
    return out / "a"


def test_a_scribble_says_nothing_wrong_and_about_as_much_as_is_asked_for() -> None:
    rows, columns = np.indices((60, 60))
    label = ((rows - 30) ** 2 + (columns - 30) ** 2 < 300).astype(np.uint8)
    found = scribbled(label, 0.05, np.random.default_rng(0))
    known = found != OPEN
    assert np.array_equal(found[known], label[known])
    for value in (0, 1):
        share = (known & (label == value)).sum() / (label == value).sum()
        assert 0.05 <= share < 0.2


def test_the_others_lose_their_labels_or_are_left_out_and_what_is_measured_on_stays(data: Path, tmp_path: Path) -> None:
    whole = read_split(data / "a", 0)
    few = make(data, tmp_path / "few", "--patients", "2")
    alone = make(data, tmp_path / "alone", "--patients", "2", "--drop")
    for site in (few, alone):
        found = read_split(site)
        assert len(found["training"]) == 2 and check_site(site).ok
        for section in ("validation", "test"):
            assert [case.name for case in found[section]] == [case.name for case in whole[section]]
    assert [item["case"] for item in datalist(few, "training")] == [
        item["case"] for item in datalist(alone, "training")
    ]
    assert len(datalist(few, "unlabelled")) == len(whole["training"]) - 2 and datalist(alone, "unlabelled") == []


def test_scribbles_are_of_training_cases_alone_and_can_be_trained_on(data: Path, tmp_path: Path) -> None:
    weak = make(data, tmp_path / "weak", "--scribbles", "0.05")
    rows = {row.name: row for row in check_site(weak, colour=True).cases}
    training = {item["case"] for item in datalist(weak, "training")}
    assert check_site(weak, colour=True).ok
    assert {name for name, row in rows.items() if row.unknown > 0.5} == training
    assert {name for name, row in rows.items() if not row.unknown} == set(rows) - training
