"""Classes are allowed where NVFlare reads the list, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pfedsam.cli import app
from pfedsam.errors import PFedSAMError


def allow(workspace: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["job", "allow", str(workspace), *words])


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_kit_is_refused_and_stays_as_it_is(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "holiday"
    if there:
        (folder / "local").mkdir(parents=True)
    done = allow(folder)
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E01"
    assert str(folder) in str(done.exception) and "--simulator" in str(done.exception)
    assert folder.exists() is there and not list(folder.rglob("*.json"))


@pytest.mark.parametrize("name", ["startup/fed_client.json", "startup/fed_server.json", "local/resources.json.default"])
def test_a_kit_gets_the_classes_and_says_when_it_has_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("{}")
    assert "classes added" in allow(tmp_path).output
    listed = json.loads((tmp_path / "local" / "resources.json").read_text())["class_allow_list"]
    assert "pfedsam.federated.learner.PFedSAMLearner" in listed
    assert "were allowed before" in allow(tmp_path).output


def test_the_workspace_of_the_simulator_is_made_where_it_is_asked_for(tmp_path: Path) -> None:
    assert "classes added" in allow(tmp_path / "ws", "--simulator").output
    assert (tmp_path / "ws" / "local" / "resources.json").is_file()
