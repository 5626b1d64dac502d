"""A site's state from a backup, and the way back from an upgrade: what the guide tells to copy is enough."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
import torch
from test_state import code_of, model, round_of, site_state
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.storage import site_model
from pfedsam.storage.state import SiteState
from pfedsam.storage.state_files import CURRENT
from pfedsam.storage.state_list import list_states


def trained(root: Path, *rounds: int) -> SiteState:
    """A site whose job has done these rounds and is over."""
    state = site_state(root)
    state.open()
    for number in rounds:
        state.save(model(number))
    state.close()
    return state


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def test_a_state_from_a_backup_is_listed_and_goes_on_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "state"
    state = trained(root, 0, 1)
    backup = Path(shutil.copytree(root, tmp_path / "backup"))
    state = trained(root, 2, 3)
    assert round_of(state) == 3
    shutil.rmtree(root)
    shutil.copytree(backup, root)
    assert modes(root) == modes(backup) and modes(root)[str((state.folder / CURRENT).relative_to(root))] == 0o600
    (entry,) = list_states(root)
    assert entry.info["round"] == 1 and not entry.problem
    shown = CliRunner().invoke(app, ["state", "list", "--root", str(root)])
    assert shown.exit_code == 0 and "problem" not in shown.output
    loaded = state.load()
    assert loaded is not None and torch.equal(loaded.shared["a"], model(1).shared["a"])
    assert round_of(trained(root, 2)) == 2


def test_the_version_before_refuses_the_state_of_a_later_one_and_goes_on_from_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "state"
    trained(root, 0, 1)
    copy = Path(shutil.copytree(root, tmp_path / "before the upgrade"))
    with monkeypatch.context() as upgraded:
        upgraded.setattr(site_model, "SCHEMA", site_model.SCHEMA + 1)
        state = trained(root, 2, 3)
        assert round_of(state) == 3
    after = (state.folder / CURRENT).read_bytes()
    assert code_of(state.load) == "E13"
    (entry,) = list_states(root)
    assert "schema" in entry.problem and (state.folder / CURRENT).read_bytes() == after
    shutil.rmtree(root)
    shutil.copytree(copy, root)
    assert round_of(state) == 1
