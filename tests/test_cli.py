"""The command as a user runs it, on a phantom of two sites with the tiny network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfedsam.cli import main
from pfedsam.data.phantom import write_phantom

TINY = ("--set", "backbone=vit_test", "--set", "image_size=64", "--set", "batch_size=4")


def pfedsam(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "COLUMNS": "120", "PFEDSAM_STATE_ROOT": str(home / "state")}
    command = [sys.executable, "-m", "pfedsam.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(out, sites=2, cases=4, shape=(48, 48, 8))
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    done = pfedsam("simulate", str(data), "--out", str(out), "--rounds", "2", *TINY, home=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worst" in done.stdout and "pfedsam state list" in done.stdout
    return out


def test_a_simulation_ends_with_numbers_pictures_and_the_state_of_every_site(run: Path):
    results = json.loads((run / "results.json").read_text())
    assert set(results["sites"]) == {"site-1", "site-2"}
    assert all(site["bytes_per_round"] > 0 for site in results["sites"].values())
    pictures = {path.stem.split("-")[1] for path in (run / "pictures").glob("*.png")}
    assert pictures == {"1", "2"} and (run / "report.html").exists()
    assert len(list((run / "state").glob("simulation/*/*/state.safetensors"))) == 2


def test_a_finished_simulation_is_not_repeated_and_a_longer_one_goes_on(run: Path, data: Path):
    again = pfedsam("simulate", str(data), "--out", str(run), "--rounds", "2", *TINY, home=run.parent)
    assert again.returncode == 0 and "has finished before" in again.stdout
    longer = pfedsam("simulate", str(data), "--out", str(run), "--rounds", "3", *TINY, home=run.parent)
    assert longer.returncode == 0, longer.stdout + longer.stderr
    log = (run / "simulator.log").read_text()
    assert "Round 2 started" in log and "Round 1 started" not in log
    assert "personal state of round 2 taken" in log


def test_state_is_listed_exported_and_deleted(run: Path, tmp_path: Path):
    root = ("--root", str(run / "state"))
    assert "simulation" in pfedsam("state", "list", *root, home=tmp_path).stdout
    out = tmp_path / "model.safetensors"
    done = pfedsam("state", "export", "simulation", "site-1", str(out), *root, home=tmp_path)
    assert done.returncode == 0 and out.exists()
    assert pfedsam("state", "delete", "simulation", "site-2", "--yes", *root, home=tmp_path).returncode == 0
    assert not (run / "state" / "simulation" / "site-2").exists()


def test_one_site_that_fails_is_one_line_and_exit_code_1(data: Path, tmp_path: Path):
    broken = tmp_path / "data"
    write_phantom(broken, sites=2, cases=4, shape=(48, 48, 8))
    next((broken / "site-2" / "labels").iterdir()).unlink()
    done = pfedsam("simulate", str(broken), "--out", str(tmp_path / "run"), "--rounds", "1", *TINY, home=tmp_path)
    assert done.returncode == 1
    assert "site-2" in done.stderr and "E03" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("simulate", "nowhere"), "E02"),
        (("job", "export", "nojob", "out"), "E16"),
        (("simulate", "{data}", "--set", "batch_size"), "E18"),
        (("state", "export", "no", "site", "x"), "E13"),
    ],
)
def test_bad_input_is_one_line_with_a_code_and_exit_code_1(arguments: tuple[str, ...], code: str, data: Path, tmp_path):
    arguments = tuple(a.format(data=data) for a in arguments)
    done = pfedsam(*arguments, home=tmp_path)
    assert done.returncode == 1 and code in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def own_umask() -> Iterator[None]:
    """`main` sets the umask of its process."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("own_umask")
@pytest.mark.parametrize("name", ["pip install 'pfedsam[he]'", "[/srv/a]", "[bold]", "ends with a backslash\\"])
def test_an_error_is_printed_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["pfedsam", "job", "export", name, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert f"there is no job '{name}'" in capsys.readouterr().err


@pytest.mark.usefixtures("own_umask")
def test_what_a_command_writes_is_closed_to_other_users(tmp_path: Path):
    done = pfedsam("phantom", str(tmp_path / "out"), "--sites", "2", "--cases", "3", "--slices", "4", home=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(written) > 6 and [path for path in written if path.stat().st_mode & 0o077] == []


def test_validate_tells_good_from_bad_by_its_exit_code(data: Path, tmp_path: Path):
    good = pfedsam("validate", str(data / "site-1"), "--json", home=tmp_path)
    assert good.returncode == 0 and json.loads(good.stdout)
    bad = pfedsam("validate", str(tmp_path), home=tmp_path)
    assert bad.returncode == 1
