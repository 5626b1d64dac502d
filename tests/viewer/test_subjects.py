"""What `pfedsam view` finds in what it is given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.viewer.session import Session
from pfedsam.viewer.subjects import subjects_of


@pytest.fixture
def run(site: Path, brain_model: Path, tmp_path: Path) -> Path:
    """A run folder as a simulation leaves it, with its data beside it."""
    for name in ("site-1", "site-2"):
        shutil.copytree(site, tmp_path / "data" / name)
        state = tmp_path / "run" / "state" / "simulation" / name / "brain_lesion_mri-0123456789ab"
        state.mkdir(parents=True)
        shutil.copy(brain_model, state / "state.safetensors")
    sections = {"one": {"section": "training"}, "two": {"section": "test"}}
    terms = {"terms": {"sites": {"site-1": sections, "site-2": sections}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(terms))
    return tmp_path / "run"


def test_a_run_shows_each_site_with_its_model_and_test_cases_first(run: Path) -> None:
    found = subjects_of(run, data=run.parent / "data")
    assert [(one.site, one.name, one.section) for one in found] == [
        ("site-1", "two", "test"),
        ("site-1", "one", "training"),
        ("site-2", "two", "test"),
        ("site-2", "one", "training"),
    ]
    assert all(one.model and one.site in one.model.parts and one.site in one.image.parts for one in found)
    assert [one.label is not None for one in found] == [False, True, False, True]
    assert {one.site for one in subjects_of(run, data=run.parent / "data", site="site-2")} == {"site-2"}


def test_a_run_that_says_where_its_data_is_needs_no_more(run: Path) -> None:
    terms = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**terms, "data": str(run.parent / "data")}))
    assert len(subjects_of(run)) == 4
    (run / "run.json").unlink()
    shutil.copytree(run.parent / "data", run / "phantom")
    assert len(subjects_of(run)) == 4


def test_a_run_without_data_or_models_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E33: .*does not say where its data is\. .*--data"):
        subjects_of(run)
    with pytest.raises(PFedSAMError, match=r"E33: .*has no site folder 'site-1'"):
        subjects_of(run, data=tmp_path)
    (tmp_path / "empty" / "state").mkdir(parents=True)
    with pytest.raises(PFedSAMError, match=r"E33: .*holds no model"):
        subjects_of(tmp_path / "empty")
    with pytest.raises(PFedSAMError, match=r"E13: .*no model of site 'elsewhere'"):
        shutil.copytree(run.parent / "data" / "site-1", run.parent / "data" / "elsewhere")
        subjects_of(run, data=run.parent / "data", site="elsewhere")


def test_an_image_in_a_site_folder_has_its_label(site: Path) -> None:
    (one,) = subjects_of(site / "images" / "one.nii.gz")
    assert one.label == site / "labels" / "one.nii.gz" and one.name == "one"
    (two,) = subjects_of(site / "images" / "two.nii.gz")
    assert two.label is None
    (given,) = subjects_of(site / "images" / "two.nii.gz", labels=site / "labels" / "one.nii.gz")
    assert given.label == site / "labels" / "one.nii.gz"
    named = subjects_of(site, labels=site / "labels")
    assert [bool(each.label) for each in named] == [True, False]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"path": "nowhere.nii"}, "E02: there is no image"),
        ({"path": "images/two.nii.gz", "labels": "nowhere"}, "E02: there is no label"),
        ({"path": "images/two.nii.gz", "labels": "labels"}, r"E02: .*holds no label 'two'"),
        ({"path": "images/two.nii.gz", "data": "."}, "E32: --data is for a run folder"),
        ({"path": "images/two.nii.gz", "model": "nowhere"}, "E13: "),
    ],
)
def test_what_is_not_there_is_named(site: Path, words: dict[str, str], error: str) -> None:
    with pytest.raises(PFedSAMError, match=error):
        Session(subjects_of(**{key: site / value for key, value in words.items()})).about(0)


def test_a_run_has_its_own_models(run: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E32: .*has its own models"):
        subjects_of(run, model=run)


def _hears_ctrl_c() -> None:
    """Also where tests run in the background of a shell, whose children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_serves_until_ctrl_c_and_says_so(site: Path) -> None:
    line = [sys.executable, "-m", "pfedsam.cli", "view", str(site)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, preexec_fn=_hears_ctrl_c, **pipes) as process:
        try:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(3)]
            with urllib.request.urlopen(f"{told[1].strip()}cases", timeout=20) as reply:
                assert len(json.load(reply)) == 2
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and err == "" and "The viewer is closed." in out


def test_an_image_that_cannot_be_read_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    line = [sys.executable, "-m", "pfedsam.cli", "view", str(tmp_path / "x.png")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "E05" in done.stderr and "Traceback" not in done.stderr
