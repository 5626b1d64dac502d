"""What a bundle expects of a site is said in one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.expected import expected_by
from pfedsam.data.phantom import write_phantom
from pfedsam.data.sites import read_split
from pfedsam.errors import PFedSAMError


def test_the_bundle_says_what_is_expected_and_overrides_change_it() -> None:
    assert expected_by("prostate_mri")["labels"] == [0, 1]
    assert expected_by("fundus_disc_cup") == {
        **{"labels": [0, 1, 2], "unknown": [], "seed": 0, "folds": 3, "colour": True, "field_of_view": None}
    }
    changed = expected_by("brain_lesion_mri", {"seed": 2, "folds": 5, "field_of_view_mm": 120.0})
    assert (changed["seed"], changed["folds"], changed["field_of_view"]) == (2, 5, 120.0)


def test_a_site_names_its_own_values() -> None:
    assert expected_by("fundus_disc_cup", label_map={"7": "disc", "9": "cup"})["labels"] == [0, 7, 9]
    with pytest.raises(PFedSAMError, match=r"E01.*lens"):
        expected_by("fundus_disc_cup", label_map={"7": "lens"})


def test_validate_checks_the_split_that_training_takes(tmp_path: Path) -> None:
    """With 5 folds the test section is another one than with 3, and the report tells the one that is asked for."""
    write_phantom(tmp_path, sites=1, cases=12, shape=(16, 16, 4))
    (tmp_path / "site-1" / "datalist.json").unlink(missing_ok=True)
    sections = {}
    for folds in (3, 5):
        words = ["validate", str(tmp_path / "site-1"), "--quick", "--json", "--seed", "1", "--set", f"folds={folds}"]
        report = json.loads(CliRunner().invoke(app, words).stdout)
        sections[folds] = {row["name"]: row["section"] for row in report["cases"]}
        split = read_split(tmp_path / "site-1", 1, folds)
        assert sections[folds] == {case.name: section for section, cases in split.items() for case in cases}
    assert sections[3] != sections[5]
