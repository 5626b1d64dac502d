"""The command as a user runs it, on a phantom of two sites with the tiny network."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pfedsam.cli import main
from pfedsam.commands.console import console
from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.simulation import Simulation
from pfedsam.deployment.simulation_starts import put_states_back, require_same_run
from pfedsam.deployment.simulator import begin_anew
from pfedsam.deployment.simulator import run as simulate
from pfedsam.errors import PFedSAMError
from pfedsam.report.page import write_report

TINY = ("--set", "backbone=vit_test", "--set", "image_size=64", "--set", "batch_size=4")


def pfedsam(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "COLUMNS": "120", "PFEDSAM_STATE_ROOT": str(home / "state")}
    command = [sys.executable, "-m", "pfedsam.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


def here(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """As `pfedsam`, in this process, which has imported everything already."""
    out, err = io.StringIO(), io.StringIO()
    environment = {"HOME": str(home), "COLUMNS": "120", "PFEDSAM_STATE_ROOT": str(home / "state")}
    umask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["pfedsam", *arguments])
        patch.setattr(console, "_width", 120)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os.umask(umask)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(out, sites=2, cases=4, shape=(48, 48, 8))
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    done = pfedsam("simulate", str(data), "--out", str(out), "--rounds", "3", *TINY, home=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worst" in done.stdout and "pfedsam state list" in done.stdout
    first = ("before the first round: global Dice", "after 1 round: global Dice", "after 2 rounds: global Dice")
    places = [done.stdout.index(text) for text in first]
    assert places == sorted(places) < [done.stdout.index("worst")]
    return out


def test_a_simulation_ends_with_numbers_pictures_and_the_state_of_every_site(run: Path):
    results = json.loads((run / "results.json").read_text())
    assert set(results["sites"]) == {"site-1", "site-2"}
    assert all(site["bytes_per_round"] > 0 for site in results["sites"].values())
    pictures = {path.stem.split("-")[1] for path in (run / "pictures").glob("*.png")}
    assert pictures == {"1", "2"} and (run / "report.html").exists()
    assert len(list((run / "state").glob("simulation/*/*/state.safetensors"))) == 2


@pytest.mark.slow
def test_a_finished_simulation_is_not_repeated_and_a_longer_one_goes_on(data: Path, tmp_path: Path):
    out = tmp_path / "run"

    def rounds(number: int) -> str:
        done = pfedsam("simulate", str(data), "--out", str(out), "--rounds", str(number), *TINY, home=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    rounds(2)
    assert "has finished before" in rounds(2)
    rounds(3)
    log = (out / "simulator.log").read_text()
    assert "Round 2 started" in log and "Round 1 started" not in log
    # the state before the final phase: that of a run which was to have three rounds from the beginning
    assert "personal state of round 1 taken" in log
    for entry in Simulation(data, out).states().values():
        assert (entry.info["round"], entry.info["final"]) == (3, True)


def test_a_run_answers_no_other_question(run: Path, data: Path):
    """As a person would ask it: another seed has other test cases, on which this model was trained."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = pfedsam("simulate", str(data), "--out", str(run), "--seed", "1", *TINY, home=run.parent)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    for words in ("E25", "setting seed: 0 then, 1 now", "another section of the split", "--out", "--fresh"):
        assert words in other.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def simulation(run: Path, data: Path, **changes: Any) -> Simulation:
    """The run of the fixture."""
    overrides = {"seed": 0, "backbone": "vit_test", "image_size": 64, "batch_size": 4}
    return replace(Simulation(data, run, overrides=overrides, rounds=3), **changes)


@pytest.fixture
def own(run: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run and of its data, to change."""
    return shutil.copytree(run, tmp_path / "run"), shutil.copytree(data, tmp_path / "data")


def test_a_run_is_refused_for_other_data_strategy_rounds_or_sites_and_says_why(own: tuple[Path, Path]):
    require_same_run(simulation(*own))
    changes = {
        "setting batch_size: 4 then, 2 now": {"overrides": {**simulation(*own).overrides, "batch_size": 2}},
        "setting experts: 1 then, 2 now": {"overrides": {**simulation(*own).overrides, "experts": 2}},
        'bundle: "brain_lesion_mri" then, "prostate_mri" now': {"bundle": "prostate_mri"},
        "strategy validate_every: 1 then, 2 now": {"strategy": {"validate_every": 2}},
        "rounds, 1 are asked for": {"rounds": 1},
    }
    for words, change in changes.items():
        with pytest.raises(PFedSAMError, match=r"E25.*--fresh") as refused:
            require_same_run(simulation(*own, **change))
        assert words in str(refused.value)
    label = next((own[1] / "site-2" / "labels").iterdir())
    label.write_bytes(label.read_bytes() + b"\0")
    with pytest.raises(PFedSAMError, match=r"E25.*site-2: 1 case\(s\) have another image or label \(s2-case"):
        simulate(simulation(*own))


def test_a_run_of_an_earlier_version_is_refused_until_it_is_moved_aside(own: tuple[Path, Path]):
    (own[0] / "run.json").unlink()
    with pytest.raises(PFedSAMError, match=r"E25.*earlier version.*--fresh"):
        require_same_run(simulation(*own))
    aside = begin_anew(simulation(*own))
    assert aside is not None and (aside / "global_model.safetensors").is_file() and (aside / "state").is_dir()
    require_same_run(simulation(*own))
    assert simulation(*own).states() == {} and simulation(*own).rounds_done == 0
    assert write_report(aside).is_file()


def test_two_runs_at_once_in_one_folder_are_refused(own: tuple[Path, Path]):
    with FileLock(own[0] / "run.lock"), pytest.raises(PFedSAMError, match="E14"):
        simulate(simulation(*own))


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_run_goes_on_from_the_states_of_its_last_whole_round(done: int, own: tuple[Path, Path]):
    one = simulation(*own)
    if done == 1:  # both states of a site are of later rounds
        with pytest.raises(PFedSAMError, match=r"E25.*no state of round 0.*--fresh"):
            put_states_back(one, done)
        return
    put_states_back(one, done)
    found = {site: (entry.info["round"], entry.info["final"]) for site, entry in one.states().items()}
    assert found == ({"site-1": (2, False), "site-2": (2, False)} if done else {})


def test_a_folder_is_named_by_the_time_and_the_command_to_go_on_is_told(data: Path, tmp_path: Path):
    """Stopped early: the command is told before anything is trained."""
    command = [sys.executable, "-m", "pfedsam.cli", "simulate", str(data), "--rounds", "1", *TINY]
    environment = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    assert process.stdout is not None
    told = next(line for line in process.stdout if "it goes on with" in line)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"simulation-\d{8}-\d{6}", out.name)
    again = shlex.split(told.split("goes on with: ")[1])
    assert again == ["pfedsam", *command[3:], "--out", f"runs/{out.name}"]
    assert process.stdout.read().splitlines()[-1] == f"stopped by SIGTERM. To go on: {shlex.join(again)}"


def test_state_is_listed_exported_and_deleted(run: Path, tmp_path: Path):
    root = ("--root", str(run / "state"))
    assert "simulation" in here("state", "list", *root, home=tmp_path).stdout
    out = tmp_path / "model.safetensors"
    done = here("state", "export", "simulation", "site-1", str(out), *root, home=tmp_path)
    assert done.returncode == 0 and out.exists()
    assert here("state", "delete", "simulation", "site-2", "--yes", *root, home=tmp_path).returncode == 0
    assert not (run / "state" / "simulation" / "site-2").exists()


def test_one_site_that_fails_is_one_line_and_exit_code_1(data: Path, tmp_path: Path):
    broken = tmp_path / "data"
    write_phantom(broken, sites=2, cases=4, shape=(48, 48, 8))
    label = next((broken / "site-2" / "labels").iterdir())
    label.rename(label.with_name("other.nii.gz"))
    done = pfedsam("simulate", str(broken), "--out", str(tmp_path / "run"), "--rounds", "1", *TINY, home=tmp_path)
    assert done.returncode == 1
    assert "site-2" in done.stderr and "E03" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("simulate", "nowhere"), "E02"),
        (("job", "export", "nojob", "out"), "E28"),
        (("simulate", "{data}", "--set", "batch_size"), "E18"),
        (("state", "export", "no", "site", "x"), "E13"),
    ],
)
def test_bad_input_is_one_line_with_a_code_and_exit_code_1(arguments: tuple[str, ...], code: str, data: Path, tmp_path):
    arguments = tuple(a.format(data=data) for a in arguments)
    done = here(*arguments, home=tmp_path)
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


def test_a_phantom_that_is_there_stays_and_another_is_refused(data: Path, tmp_path: Path):
    def again(cases: int, *more: str) -> subprocess.CompletedProcess[str]:
        words = ("--sites", "2", "--cases", str(cases), "--slices", "4", "--size", "16")
        return here("phantom", str(tmp_path / "out"), *words, *more, home=tmp_path)

    assert again(3).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}
    same, other = again(3), again(4)
    assert same.returncode == 0 and "nothing was written" in same.stdout
    assert other.returncode == 1 and "E24" in other.stderr and "cases 3, not 4" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")} == before
    assert again(4, "--force").returncode == 0
    told = here("phantom", "--help", home=tmp_path).stdout
    assert "a folder of anything else never" in " ".join(told.split()) and "whosever" not in told


def test_validate_tells_good_from_bad_by_its_exit_code(data: Path, tmp_path: Path):
    good = here("validate", str(data / "site-1"), "--json", home=tmp_path)
    assert good.returncode == 0 and json.loads(good.stdout)
    bad = here("validate", str(tmp_path), home=tmp_path)
    assert bad.returncode == 1


@pytest.mark.slow
def test_a_demo_that_is_stopped_says_how_to_go_on(tmp_path: Path):
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        command = [sys.executable, "-m", "pfedsam.cli", "demo", "--out", str(tmp_path / "demo")]
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(tmp_path), "COLUMNS": "200"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    limit = time.monotonic() + 400
    # printed when the settings of the demo have passed all checks, and its simulator is about to be told
    while "if it is stopped, it goes on with" not in said.read_text():
        assert process.poll() is None and time.monotonic() < limit, said.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    last = said.read_text().splitlines()[-1]
    assert last.startswith("stopped by SIGINT. To go on: pfedsam demo --out ") and last.endswith(
        "what is done is kept."
    )
