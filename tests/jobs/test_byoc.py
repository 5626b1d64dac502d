"""The job that brings its own code, where this package is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import ROOT, SOURCE, Job, Run, simulate
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.jobs import export_job
from pfedsam.errors import PFedSAMError
from pfedsam.storage.state_list import list_states

#: Run at the start of every interpreter: this package is as good as not installed.
UNINSTALL = f"import sys\nsys.path[:] = [path for path in sys.path if path != {str(ROOT / 'custom')!r}]\n"
#: At the end of the job's own `pfedsam/__init__.py`: which processes import it.
MARK = "\nimport os as _os, pathlib as _p\n(_p.Path(_os.environ['MARKS']) / str(_os.getpid())).write_text(__file__)\n"


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of an environment without the package."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(UNINSTALL)
    (folder / "marks").mkdir()
    variables = {"PYTHONPATH": str(folder), "MARKS": str(folder / "marks")}
    command = [sys.executable, "-c", "import pfedsam.errors"]
    found = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, cwd=folder)
    assert "No module named 'pfedsam" in found.stderr
    return variables


@pytest.fixture(scope="module")
def run(without: dict[str, str], federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("byoc")
    exported = folder / "exported"
    done = CliRunner().invoke(app, ["job", "export", str(SOURCE), str(exported), "--byoc", "--least-sites", "2"])
    assert done.exit_code == 0, done.output
    module = exported / "app" / "custom" / "pfedsam" / "__init__.py"
    module.write_text(module.read_text() + MARK)
    return simulate(folder, Job(recorded=False, source=exported), federation, environment=without, forked=False)


def test_a_job_with_our_code_runs_where_the_package_is_not_installed(run: Run, without: dict[str, str]) -> None:
    assert run.exit_code == 0, run.output[-3000:]
    assert {entry.site for entry in list_states(run.state_root)} == {"site-1", "site-2"}
    assert all(entry.info["final"] for entry in list_states(run.state_root))
    assert all(one["accepted"] for one in run.received())
    told = [path.read_text() for path in Path(without["MARKS"]).iterdir()]
    # the server's process and the two sites'
    assert len(told) >= 3
    assert all("custom/pfedsam/__init__.py" in one and str(ROOT) not in one for one in told)


def test_the_job_holds_what_a_site_needs_and_nothing_else(tmp_path: Path) -> None:
    job = export_job(SOURCE, tmp_path / "job", byoc=True)
    custom = job / "app" / "custom"
    names = {path.name for path in custom.rglob("*")}
    assert not names & {"__pycache__", "tests", ".git", "results"}
    assert (custom / "pfedsam" / "bundles" / "prostate_mri" / "configs" / "train.json").is_file()
    assert (custom / "pfedsam" / "jobs" / "strategies" / "pfedsam.json").is_file()
    needed = {re.split("[<>=[]", line)[0] for line in (custom / "requirements.txt").read_text().splitlines()}
    assert {"nvflare", "monai", "torch"} <= needed and not needed & {"pytest", "mypy"}
    assert sum(path.stat().st_size for path in job.rglob("*") if path.is_file()) < 3e6


def test_a_locked_job_with_code_is_a_contradiction(tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E32.*carries no code"):
        export_job(SOURCE, tmp_path / "job", byoc=True, locked=True)
    assert not (tmp_path / "job").exists()
