"""`pfedsam job`: a job folder that a person made or changed is not overwritten, and a job is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.job_files import find_job, server_settings
from pfedsam.deployment.jobs import export_job
from pfedsam.errors import PFedSAMError
from pfedsam.storage.job_plan import SERVER

JOB = find_job("pfedsam")


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def job(*words: str | Path) -> PFedSAMError | None:
    done = CliRunner().invoke(app, ["job", *map(str, words)])
    assert done.exit_code == 0 or isinstance(done.exception, PFedSAMError), done.output
    return done.exception if isinstance(done.exception, PFedSAMError) else None


WRITE = {"export": ("export", "pfedsam"), "make": ("make", "fedavg_lora")}


@pytest.mark.parametrize("words", WRITE.values(), ids=WRITE)
def test_a_job_that_a_person_made_or_changed_is_replaced_by_force_only(words: tuple[str, ...], tmp_path: Path) -> None:
    own, exported = tmp_path / "own", tmp_path / "exported"
    shutil.copytree(JOB, own)
    assert job(*words, exported) is None
    config = exported / "app" / "config" / SERVER
    config.write_text(config.read_text().replace('"num_rounds"', '"num_rounds" '))
    for folder in (own, exported):
        (folder / "notes.txt").write_text("mine")
        before = content(folder)
        problem = job(*words, folder)
        assert problem is not None and problem.code == "E24" and "--force" in str(problem)
        assert content(folder) == before
        assert job(*words, folder, "--force") is None and not (folder / "notes.txt").exists()
    assert sorted(os.listdir(tmp_path)) == ["exported", "own"]


@pytest.mark.parametrize("words", WRITE.values(), ids=WRITE)
def test_a_folder_that_is_no_job_is_never_replaced(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    for force in ((), ("--force",)):
        problem = job(*words, tmp_path, *force)
        assert problem is not None and problem.code == "E24" and "give --force" not in str(problem)
    assert os.listdir(tmp_path) == ["thesis.doc"]


def test_an_exported_job_that_is_as_it_was_written_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "job"
    for rounds in (3, 4):
        export_job(JOB, out, server={"num_rounds": rounds})
        assert server_settings(out)["num_rounds"] == rounds
    # a copy of an exported job is sealed as it is, not as its source was
    export_job(out, tmp_path / "copy", server={"num_rounds": 5})
    export_job(JOB, tmp_path / "copy")


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = export_job(JOB, tmp_path / "job")
    before, broken = content(out), tmp_path / "broken"
    shutil.copytree(JOB, broken)
    (broken / "app" / "config" / SERVER).write_text(json.dumps({"components": []}))
    with pytest.raises(PFedSAMError, match="E29"):
        export_job(broken, out)
    assert content(out) == before and sorted(os.listdir(tmp_path)) == ["broken", "job"]


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_a_job_is_not_written_into_or_around_the_one_that_is_copied(place: str, tmp_path: Path) -> None:
    source = tmp_path / "outer" / "job"
    shutil.copytree(JOB, source)
    before = content(source)
    with pytest.raises(PFedSAMError, match="E32"):
        export_job(source, source / place, force=True)
    assert content(source) == before
