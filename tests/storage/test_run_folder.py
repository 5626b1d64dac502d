"""Run folders are ours, or are left alone; a run that is moved aside takes no data with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.ownership import marker
from pfedsam.storage.run_folder import claim_run, is_comparison, is_deployment, is_simulation, move_aside

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"


def filled(folder: Path, *names: str) -> Path:
    """A folder with files, and with folders where a name ends with a slash."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return folder


LAID_OUT = [
    ("simulation", is_simulation, ("simulator.log", "state/", "workspace/server/")),
    ("comparison", is_comparison, ("trainings/abc/lock", "logs/abc.log")),
    ("poc", is_deployment, ("project.yml", "home/", "logs/", "kits/x/prod_00/")),
]


@pytest.mark.parametrize(("what", "laid_out", "names"), LAID_OUT, ids=[one[0] for one in LAID_OUT])
def test_a_folder_of_an_earlier_version_is_taken_and_one_that_lacks_a_part_is_not(
    what: str, laid_out: Callable[[Path], bool], names: tuple[str, ...], tmp_path: Path
) -> None:
    old = filled(tmp_path / "old", *names)
    assert claim_run(old, what, laid_out) and (marker(old) or {})["what"] == what
    assert not claim_run(old, what, laid_out), "it is known now"
    for left_out in names:
        other = filled(tmp_path / left_out.strip("/").replace("/", "_"), *(one for one in names if one != left_out))
        with pytest.raises(PFedSAMError, match="E24"):
            claim_run(other, what, laid_out)
        assert marker(other) is None


def test_what_is_moved_aside_is_the_run_and_nothing_else(tmp_path: Path) -> None:
    mine = ("state/a", "workspace/b", "global_model.safetensors", "run.json", "earlier/0/c")
    theirs = ("data/site-1/images/x", "notes.txt", "exported/meta.json")
    folder = filled(tmp_path / "run", *mine, *theirs)
    target = move_aside(folder)
    assert target is not None and all((target / name).is_file() and not (folder / name).exists() for name in mine)
    assert all((folder / name).is_file() for name in theirs)
    assert move_aside(folder) is None


@pytest.mark.parametrize("command", ["simulate", "demo", "compare", "poc run", "poc up"])
def test_a_command_leaves_a_folder_alone_that_is_not_ours(command: str, tmp_path: Path) -> None:
    folder = filled(tmp_path / "theirs", "workspace/thesis.txt", "kits/root.key", "state/s", "trainings/t")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [*command.split(), "--runtime" if "poc" in command else "--out", str(folder)]
    if command in ("simulate", "compare"):
        write_phantom(tmp_path / "data", sites=2, cases=4, shape=(16, 16, 4))
        words.append(str(tmp_path / "data"))
    if "poc" in command:
        words += ["--project", str(PROJECT), "--port", "45917"]
    done = subprocess.run([sys.executable, "-m", "pfedsam.cli", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "E24" in done.stderr and "--force" in done.stderr, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
