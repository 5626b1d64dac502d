"""A dry run of a site trains on its real data, shows what would leave, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.cli import app
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import NOISE, PACK, Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.kits import FILTER
from pfedsam.deployment.processes import Deployment
from pfedsam.deployment.rehearsal import Needs, asked, check_data, enough, find_site, needs, temporary_folder
from pfedsam.deployment.rehearsal_boundary import leaving
from pfedsam.deployment.rehearsal_messages import Asked, Measured
from pfedsam.deployment.rehearsal_round import run
from pfedsam.deployment.rehearsal_terms import check_terms, read_terms
from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import GAP_KEY
from pfedsam.federated.plan import Plan
from pfedsam.federated.settings import KIT_DEFAULTS, SiteSettings
from pfedsam.storage.job_plan import CLIENT
from pfedsam.training.round_result import RoundResult

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
SMALL = {
    "image_size": 64,
    "adapted_blocks": 1,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 1,
    "negatives_per_case": 1,
}
SHARED = {"lora_a", "lora_b", "decoder_subset"}


def exported(out: Path, name: str = "pfedsam", *, locked: bool = True, **told: Any) -> Path:
    plan = {"federation": "lesions", "overrides": SMALL, **told.pop("plan", {})}
    server = {"num_rounds": 2, "min_clients": 3, **told.pop("server", {})}
    return export_job(find_job(name), out, locked=locked, plan=plan, server=server, privacy=told.pop("privacy", None))


def hospital(**changed: Any) -> SiteSettings:
    return SiteSettings(**{"federations": ("lesions",), **KIT_DEFAULTS, **changed})


def wrong(job: Path, site: SiteSettings, denied: bool = True) -> dict[str, str]:
    found = check_terms(read_terms(str(job)), site, None, denied)
    return {finding.name: finding.message for finding in found if not finding.fine}


# the round ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, Measured, Path]:
    """A small round of a job with clipping and packing, in this process."""
    root = tmp_path_factory.mktemp("rehearsal")
    site = find_site(tiny_site(root / "hospital", 1, rgb=False), {"prepared_root": "/somewhere", "threads": 1})
    job = exported(root / "job", privacy=Privacy(clip=1.0, noise_multiplier=0.1, precision="int8"))
    terms = read_terms(str(job))
    report, _ = check_data(site, terms)
    work = root / "work"
    work.mkdir()
    told = asked(site, terms, report, work, cases=2)
    before = os.umask(0o077)
    try:
        return told, run(told, lambda text: None), work
    finally:
        os.umask(before)


def test_only_shared_tensors_would_leave_and_the_personal_ones_stay(rehearsed: tuple[Asked, Measured, Path]) -> None:
    told, measured, _ = rehearsed
    leaves = measured.leaves
    assert set(leaves.groups) == SHARED and leaves.stays > 0
    # one byte a number, as packed; the counts are those of the plan
    assert leaves.bytes == sum(group.numbers for group in leaves.groups.values())
    assert sum(group.tensors for group in leaves.groups.values()) == len(Plan(**told.plan).shared())
    assert leaves.done == ["clip 1, noise 0.1 times that", "packed as int8"] and leaves.not_done == []
    assert set(leaves.scalars) == {"NUM_STEPS_CURRENT_ROUND", "pfedsam_round", "pfedsam_fingerprint"}


def test_it_trains_some_of_the_cases_and_says_how_many_there_are(rehearsed: tuple[Asked, Measured, Path]) -> None:
    told, measured, _ = rehearsed
    assert (measured.cases, told.cases) == (2, 2) and told.all_cases > 2
    assert measured.steps["global"] > 0 and measured.steps["final"] > 0 and len(measured.loaded) == 2
    assert measured.memory_bytes > 2**27 and measured.state_bytes > 10_000


def test_what_it_writes_is_closed_to_others(rehearsed: tuple[Asked, Measured, Path]) -> None:
    _, measured, work = rehearsed
    files = [path for path in work.rglob("*") if path.is_file()]
    assert any("state" in path.parts for path in files)
    assert measured.prepared_cases >= 2 and any("prepared" in path.parts for path in files)
    assert [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_estimates_grow_with_cases_rounds_and_epochs(rehearsed: tuple[Asked, Measured, Path], tmp_path: Path) -> None:
    told, measured, _ = rehearsed
    terms = read_terms(str(exported(tmp_path / "job")))
    few = needs(measured, told, terms, 60)
    many = needs(measured, told.model_copy(update={"all_cases": 100 * told.all_cases}), terms, 60)
    assert few.start_minutes >= 1 and many.round_minutes > 20 * few.round_minutes
    assert many.disk_gib > few.disk_gib and many.job_minutes > many.round_minutes


def test_a_machine_that_is_too_small_is_said(rehearsed: tuple[Asked, Measured, Path]) -> None:
    site = SimpleNamespace(settings=SiteSettings())
    huge = Needs(1, 1, 1, 1, 1, memory_gib=1e6, cache_gib=1, disk_gib=1e6, megabytes=1)
    assert [finding.fine for finding in enough(site, huge)] == [False, False]  # type: ignore[arg-type]


# the boundary ---------------------------------------------------------------------------------------------------------


def handed_over(job: Path) -> tuple[RoundResult, Any, Plan]:
    """What a learner would hand over, of the right names and shapes."""
    plan = Plan(**json.loads((job / "app" / "config" / "plan.json").read_text()))
    made = [{name: torch.ones(spec.shape) for name, spec in part.items()} for part in (plan.shared(), plan.personal())]
    return RoundResult(*made), SimpleNamespace(strategy=plan.checked(), fingerprint="ab" * 32), plan


def test_a_site_that_shares_less_than_the_job_is_told_before_it_joins(tmp_path: Path) -> None:
    result, local, plan = handed_over(exported(tmp_path / "job"))
    with pytest.raises(PFedSAMError, match=r"E19.*decoder_subset"):
        leaving(result, local, plan, [], cases=3, may_share=("lora_a", "lora_b"))


def test_a_tensor_that_nobody_knows_stops_the_rehearsal(tmp_path: Path) -> None:
    result, local, plan = handed_over(exported(tmp_path / "job"))
    result.personal["image_encoder.secret"] = torch.ones(2)
    with pytest.raises(PFedSAMError, match=r"E19.*unknown tensors.*secret"):
        leaving(result, local, plan, [], cases=3, may_share=None)


def test_a_number_that_the_strategy_asks_for_is_shown_unless_the_site_leaves_it_out(tmp_path: Path) -> None:
    result, local, plan = handed_over(exported(tmp_path / "job"))
    plan.strategy = {**(plan.strategy or {}), "weights": "gaa"}
    result.gap = 0.12
    told = leaving(result, local, plan, [], cases=3, may_share=None, further=plan.further())
    assert plan.further() == (GAP_KEY,) and "training slices" in told.scalars[GAP_KEY]
    assert GAP_KEY not in leaving(result, local, plan, [], cases=3, may_share=None).scalars


def test_a_filter_that_needs_the_federation_is_said_not_to_have_run(tmp_path: Path) -> None:
    result, local, plan = handed_over(exported(tmp_path / "job"))
    chain = [{"path": NOISE, "args": {"clip": 1.0}}, {"path": "pfedsam.federated.encryption.EncryptUpdate"}]
    left = leaving(result, local, plan, chain, cases=3, may_share=None)
    assert left.not_done == ["EncryptUpdate"] and len(left.done) == 1
    assert leaving(result, local, plan, [{"path": PACK, "args": {"precision": "fp16"}}], cases=3, may_share=None).bytes


# the job --------------------------------------------------------------------------------------------------------------


def test_a_job_that_the_site_would_take_has_nothing_wrong(tmp_path: Path) -> None:
    assert wrong(exported(tmp_path / "job"), hospital()) == {}


@pytest.mark.parametrize(
    ("line", "code", "site", "job"),
    [
        ("job: federation", "E21", {"federations": ("other",)}, {}),
        ("job: sites", "E27", {}, {"server": {"min_clients": 2}}),
        ("job: length", "E26", {"most_rounds": 1}, {}),
        ("job: length", "E26", {"most_epochs": 1}, {}),
        ("job: clip and noise", "E23", {"largest_clip": 0.5}, {"privacy": Privacy(clip=1.0)}),
        ("job: code", "denies it", {}, {"locked": False}),
    ],
)
def test_a_job_that_the_site_would_refuse_is_told_with_its_code(
    tmp_path: Path, line: str, code: str, site: dict[str, Any], job: dict[str, Any]
) -> None:
    found = wrong(exported(tmp_path / "job", **job), hospital(**site))
    assert list(found) == [line] and code in found[line]


def test_a_job_with_another_filter_or_class_is_told(tmp_path: Path) -> None:
    job = exported(tmp_path / "job")
    file = job / "app" / "config" / CLIENT
    content = json.loads(file.read_text())
    content["task_result_filters"][0]["filters"] = [{"path": "builtins.exec"}, {"path": FILTER}]
    file.write_text(json.dumps(content))
    found = wrong(job, hospital())
    assert "E15" in found["job: filters"] and "builtins.exec" in found["job: classes"]


def test_a_federations_job_says_its_bundle_itself(tmp_path: Path) -> None:
    job = exported(tmp_path / "job")
    with pytest.raises(PFedSAMError, match="E32"):
        read_terms(str(job), bundle="prostate_mri")
    assert read_terms("ditto", overrides=SMALL, federation="mine").plan.federation == "mine"


# the command ----------------------------------------------------------------------------------------------------------


def rehearse(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["site", "rehearse", *map(str, words)], env={"COLUMNS": "300"})
    return done.exit_code, done.output or str(done.exception)


def test_data_that_are_wrong_end_it_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    site = tiny_site(tmp_path / "hospital", 1, rgb=False)
    (site / "labels" / "tiny1.nii.gz").rename(site / "labels" / "other.nii.gz")
    code, text = rehearse(site, "--report", tmp_path / "r.json")
    assert code == 1 and "E03" in text and "NOT verified" in text and "tiny1" in text
    evidence = (tmp_path / "r.json").read_text()
    assert "tiny" not in evidence and json.loads(evidence)["measured"] is None
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o600
    assert list(tmp_path.glob("pfedsam-rehearsal-*")) == []
    # evidence is not written over
    again = CliRunner().invoke(app, ["site", "rehearse", str(site), "--report", str(tmp_path / "r.json")])
    assert "E24" in str(again.exception)


def test_a_server_has_nothing_to_rehearse(tmp_path: Path) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_server.json").write_text("{}")
    done = CliRunner().invoke(app, ["site", "rehearse", str(tmp_path)])
    assert done.exit_code == 1 and "E01" in str(done.exception) and "server" in str(done.exception)


def test_folders_of_rehearsals_that_were_killed_go_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, runs = tmp_path / f"pfedsam-rehearsal-{gone.pid}-x", tmp_path / f"pfedsam-rehearsal-{os.getpid()}-x"
    left.mkdir()
    runs.mkdir()
    with pytest.raises(ValueError, match="stop"), temporary_folder() as work:
        assert stat.S_IMODE(work.stat().st_mode) == 0o700
        (work / "state").mkdir()
        raise ValueError("stop")
    assert not left.exists() and not work.exists() and runs.exists()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a hospital that was made ready, with data."""
    root = tmp_path_factory.mktemp("joining")
    deployment = Deployment(root / "federation", PROJECT)
    deployment.provision()
    kit = deployment.kit(deployment.sites[0])
    tiny_site(root / "data", 1, rgb=False)
    line = ["site", "init", str(kit), "--data-root", str(root / "data"), "--state-root", str(root / "state")]
    line += ["--prepared-root", str(root / "prepared"), "--federations", "lesions", "--threads", "1"]
    assert CliRunner().invoke(app, line).exit_code == 0
    exported(root / "job")
    return kit


def command(kit: Path, tmp: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "pfedsam.cli", "site", "rehearse", str(kit), *words]
    env = {**os.environ, "TMPDIR": str(tmp), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # as at a terminal: a runner in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_hospital_rehearses_its_kit_with_the_job_that_will_come(kit: Path, tmp_path: Path) -> None:
    root = next(folder.parent for folder in kit.parents if folder.name == "federation")
    process = command(kit, tmp_path, "--job", str(root / "job"), "--report", str(tmp_path / "r.json"))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    for told in ("job: federation", "outgoing filter", "small round", "personal tensors stay", "NOT verified"):
        assert told in text
    evidence = json.loads((tmp_path / "r.json").read_text())
    assert set(evidence["measured"]["leaves"]["groups"]) == SHARED
    assert "certificate" in str(evidence["not_verified"]) and "tiny" not in json.dumps(evidence)
    # neither the state nor the prepared volumes are in the site's own folders
    assert not any((root / "state").rglob("*.safetensors")) and not any((root / "prepared").rglob("*.slices"))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rehearsal_that_is_stopped_leaves_no_folder_and_no_process(
    kit: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = command(kit, tmp_path)
    while not list(tmp_path.glob("pfedsam-rehearsal-*/bundle")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    text, _ = process.communicate()
    assert process.returncode == 128 + number and "Nothing was sent" in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
    assert len(children) >= 2 and not any(child.is_running() for child in children)


@pytest.mark.slow
def test_a_bundle_that_cannot_load_the_data_is_an_error_with_its_code(kit: Path, tmp_path: Path) -> None:
    process = command(kit, tmp_path, "--bundle", "fundus_disc_cup")
    text, _ = process.communicate()
    assert process.returncode == 1 and "WRONG" in text and "E0" in text and list(tmp_path.iterdir()) == []
