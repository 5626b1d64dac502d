"""Server and sites as real processes with mutual TLS: a locked job runs, and what must be refused is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import PROJECT, TINY, Federation, change_config, free_port, wait_for

from pfedsam.deployment.admin import JobResult, connect, reason_of
from pfedsam.deployment.audit import audit, statement
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.kits import init_kit
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.deployment.site_check import check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.records import CHECKED, LEFT
from pfedsam.federated.settings import SiteSettings
from pfedsam.inference.pair import pair
from pfedsam.storage.job_plan import CLIENT, SERVER
from pfedsam.storage.site_model import read


def test_a_locked_job_runs_and_personal_models_are_in_each_sites_state_only(federation: Federation) -> None:
    result = federation.run(federation.job())
    assert result.completed, result.problem()
    states = federation.states()
    assert set(states) == {"hospital-a", "hospital-b"}
    for site, entry in states.items():
        assert entry.info["final"] and entry.info["round"] == 2
        assert federation.deployment.state_root(site) in entry.file.parents
        assert any("experts" in name or "moe" in name for name in read(entry.file).personal)
    # neither the server nor a kit holds a personal model
    kits = federation.deployment.kit(federation.deployment.server).parent
    assert not [path for path in kits.rglob("*.safetensors") if "global_model" not in path.name]
    assert result.file("global_model.safetensors") is not None
    last = result.file("global_model.safetensors")
    assert last is not None
    paired = pair(last, states["hospital-a"].file)
    assert not paired.info["mixed"] and not paired.moments and paired.personal
    found = audit(federation.deployment.kit("hospital-a"), result.job_id)
    assert found.problems == [] and len(found.stage(LEFT)) >= 3
    trained = [one for one in found.stage(CHECKED) if one["task"] == "train"]
    assert trained and all(one["bytes"] > 0 and one["excluded"] > 0 for one in trained)


@pytest.mark.slow
def test_a_whole_chain_of_allow_list_noise_and_int8_runs(federation: Federation) -> None:
    """Model selection and metrics files read the packed result; the audit shows what it was packed to."""
    # two rounds: NVFlare selects no model in the first
    job = federation.job("private", rounds=2, privacy=Privacy(clip=10.0, noise_multiplier=1e-4, precision="int8"))
    result = federation.run(job)
    assert result.completed, result.problem()
    assert result.file("best_global_model.safetensors") is not None and result.file("metrics_summary.json") is not None
    found = audit(federation.deployment.kit("hospital-a"), result.job_id)
    assert found.problems == []
    checked, left = ([one for one in found.stage(name) if one["task"] == "train"] for name in (CHECKED, LEFT))
    assert len(checked) == len(left) == 2
    assert [one["bytes"] for one in left] == [one["bytes"] / 4 for one in checked]


def test_site_check_finds_nothing_wrong_and_then_what_was_made_wrong(federation: Federation, tmp_path: Path) -> None:
    kit = federation.deployment.kit("hospital-a")
    assert [one for one in check_kit(kit) if not one.fine] == []
    copy = Path(shutil.copytree(kit, tmp_path / "hospital-a", ignore=shutil.ignore_patterns("*-*-*")))
    resources = json.loads((copy / "local" / "resources.json").read_text())
    resources |= {"allow_log_streaming": True, "class_allow_list": ["pfedsam."]}
    (copy / "local" / "resources.json").write_text(json.dumps(resources))
    (copy / "local" / "privacy.json").unlink()
    shutil.copy(copy / "local" / "authorization.json.default", copy / "local" / "authorization.json")
    wrong = {one.name for one in check_kit(copy) if not one.fine}
    assert wrong == {"classes", "log streaming", "outgoing filter", "code in jobs", "shell commands"}


def test_site_check_names_host_and_port_of_a_server_that_does_not_answer(
    federation: Federation, tmp_path: Path
) -> None:
    kit, port = federation.deployment.kit("hospital-a"), free_port()
    copy = Path(shutil.copytree(kit, tmp_path / "hospital-a", ignore=shutil.ignore_patterns("*-*-*")))
    config = copy / "startup" / "fed_client.json"
    config.write_text(config.read_text().replace(f"localhost:{federation.deployment.port}", f"localhost:{port}"))
    (found,) = [one for one in check_kit(copy) if one.name == "server"]
    assert not found.fine and "localhost" in found.message and str(port) in found.message


def test_site_check_of_the_server_knows_its_own_port_from_a_taken_one(federation: Federation, tmp_path: Path) -> None:
    kit = federation.deployment.kit(federation.deployment.server)
    assert [one for one in check_kit(kit) if not one.fine] == []
    copy = tmp_path / "server"
    for name in ("startup", "local"):
        shutil.copytree(kit / name, copy / name)
    (taken,) = [one for one in check_kit(copy) if not one.fine]
    assert taken.name == "port" and str(federation.deployment.port) in taken.message


SERIALISED_BEFORE = """
import sys
from pathlib import Path
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils import fobs
fobs.dumps(Shareable())
from pfedsam.deployment.admin import connect
with connect(Path(sys.argv[1]), timeout=20) as session:
    print(len(session.get_connected_client_list()))
"""


def test_an_administrator_connects_whatever_the_process_serialised_before(federation: Federation) -> None:
    """Without stdin, and with a home folder that does not exist."""
    command = [sys.executable, "-c", SERIALISED_BEFORE, str(federation.deployment.admin())]
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, env={**os.environ, "HOME": "/nonexistent"}, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


def test_a_server_that_is_not_there_is_named_with_the_reason(federation: Federation, tmp_path: Path) -> None:
    kit = Path(shutil.copytree(federation.deployment.admin(), tmp_path / "admin@coordination.org"))
    config, port = kit / "startup" / "fed_admin.json", free_port()
    config.write_text(config.read_text().replace(str(federation.deployment.port), str(port)))
    with pytest.raises(PFedSAMError, match=r"E22.*cannot connect to server"), connect(kit, timeout=1):
        pass


def test_a_reason_holds_no_secret() -> None:
    told = reason_of(RuntimeError(f"token {'aZ09' * 20} of localhost:8002 was refused.\nand more"))
    assert told == "RuntimeError: token ... of localhost:8002 was refused"


def with_code(job: Path) -> None:
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "mine.py").write_text("print('hello')\n")


def without_filter(job: Path) -> None:
    change_config(job, CLIENT, lambda c: c.update(task_result_filters=[]))


def with_another_class(job: Path) -> None:
    other = {"id": "spy", "path": "pfedsam.deployment.simulation.Simulation", "args": {}}
    for side in (SERVER, CLIENT):
        change_config(job, side, lambda c: c["components"].append(other))


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, str]] = {
    "code in the job": ({}, with_code, "(?i)byoc|not authorized"),
    "another federation": ({"federation": "somebody-else"}, None, "E21"),
    "an expression": ({"overrides": {**TINY, "batch_size": "$__import__('os').getpid()"}}, None, "E18"),
    "no filter": ({}, without_filter, "E15"),
    "experts declared shared": (
        {
            "strategy": {
                "name": "x",
                "shared": ["lora_a", "lora_b", "decoder_subset", "experts"],
                "personal": [],
                "phases": [{"name": "one", "trains": ["shared"], "experts": True}],
            }
        },
        None,
        "E16",
    ),
    "a path": ({"overrides": {**TINY, "checkpoint": "/etc/passwd"}}, None, "E18"),
    "a target": ({"overrides": {**TINY, "batch_size": {"_target_": "os.getpid"}}}, None, "E18"),
    "a variable of the machine": ({"federation": "{$USER}"}, None, "E18"),
    "a class that is not listed": ({}, with_another_class, "(?i)not authorized|NotAuthorized|not allowed"),
}


def assert_refused(federation: Federation, name: str) -> None:
    plan, change, reason = REFUSED[name]
    before = {site: entry.file.read_bytes() for site, entry in federation.states().items()}
    job = federation.job("bad", rounds=1, **plan)
    if change:
        change(job)
    try:
        result = federation.run(job)
    except PFedSAMError as error:
        said = str(error)
    else:
        assert not result.completed
        said = result.problem()
    assert re.search(reason, said), said
    # and no site has trained
    assert {site: entry.file.read_bytes() for site, entry in federation.states().items()} == before


@pytest.mark.slow
def test_sites_that_nobody_has_made_ready_refuse_before_they_read_data(tmp_path: Path, phantom: list[Path]) -> None:
    """Kits as NVFlare provisions them by default: they take code in jobs, and send their error logs to the server."""
    content = yaml.safe_load(PROJECT.read_text()) | {"allow_log_streaming": True}
    (tmp_path / "project.yml").write_text(yaml.safe_dump(content))
    deployment = Deployment(tmp_path / "runtime", tmp_path / "project.yml", free_port())
    deployment.provision()
    server = deployment.kit(deployment.server)
    init_kit(server, SiteSettings(), byoc=True)
    _receive_logs(server / "local")
    # what a site would tell of its data: a case without a label
    broken = Path(shutil.copytree(phantom[0], tmp_path / "data"))
    next((broken / "labels").iterdir()).unlink()
    (case,) = {path.name for path in (broken / "images").iterdir()} - {
        path.name for path in (broken / "labels").iterdir()
    }
    told = {OUTCOME_VARIABLE: "10", "PFEDSAM_DATA": str(broken), "PFEDSAM_STATE_ROOT": str(tmp_path / "states")}
    try:
        deployment.start(environment=told)
        with connect(deployment.admin()) as session:
            deployment.wait(session)
            federation = Federation(deployment, {}, session, tmp_path)
            result = federation.run(federation.job(rounds=1, code=[Path(__file__).with_name("misbehaving.py")]))
            time.sleep(5)  # NVFlare sends the log of a job after its end
    finally:
        assert deployment.stop() == []
    assert not result.completed and "SITE_REFUSED:E01" in result.problem()
    said = [federation.log_of(site, result.job_id) for site in deployment.sites]
    # the first refusal ends the job: another site may have had no task yet
    assert any("pfedsam site init <kit>" in log for log in said)
    assert not any(case in log for log in said)
    assert not (tmp_path / "states").exists()
    received = [path.read_bytes() for path in server.rglob("*") if path.is_file()]
    assert any(b"pfedsam site init <kit>" in data for data in received), "no log has come: there is nothing to see"
    assert not any(case.encode() in data for data in received)


def _receive_logs(local: Path) -> None:
    """A server as NVFlare provisions it, which keeps the logs that come."""
    resources, default = (
        json.loads((local / name).read_text()) for name in ("resources.json", "resources.json.default")
    )
    resources["components"] += [one for one in default["components"] if one["path"].endswith("JobLogReceiver")]
    resources["allow_log_streaming"] = True
    (local / "resources.json").write_text(json.dumps(resources))


@pytest.mark.parametrize("name", ["code in the job", "another federation"])
def test_a_bad_job_is_refused_with_a_reason(federation: Federation, name: str) -> None:
    assert_refused(federation, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("code in the job", "another federation")])
def test_other_bad_jobs_are_refused_with_a_reason(federation: Federation, name: str) -> None:
    assert_refused(federation, name)


def test_a_job_of_the_project_passes_nvflares_own_checks(federation: Federation, tmp_path: Path) -> None:
    from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
    from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

    job = federation.job()
    valid, error, _ = JobMetaValidator().validate(job.name, zip_directory_to_bytes(str(job.parent), job.name))
    assert valid, error
    said = federation.preflight("hospital-b")
    assert "PASSED" in said and "FAILED" not in said, said


def test_a_taken_port_is_an_error_before_anything_starts(federation: Federation, tmp_path: Path) -> None:
    second = Deployment(tmp_path, PROJECT, federation.deployment.port)
    with pytest.raises(PFedSAMError, match=rf"E22.*{federation.deployment.port}"):
        second.start()
    assert second.processes() == []


def test_the_statement_names_what_leaves_and_what_stays() -> None:
    text = statement()
    for word in ("lora_a", "val_dice", "E21", "experts", "can leak", "Not for diagnostic use"):
        assert word in text
    assert "provabl" not in text


def poc_run(folder: Path, phantom: list[Path], port: int, *more: str) -> list[str]:
    """What `make poc` calls, smaller."""
    (folder / "data").mkdir(exist_ok=True)
    for site, data in zip(("hospital-a", "hospital-b"), phantom, strict=True):
        (folder / "data" / site).symlink_to(data)
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "pfedsam.cli", "poc", "run", "--runtime", str(folder / "runtime")]
    return [*command, "--project", str(PROJECT), "--port", str(port), "--data", str(folder / "data"), *settings, *more]


def test_make_poc_s_command_leaves_nothing_running(tmp_path: Path, phantom: list[Path]) -> None:
    """Real processes from provisioning to the table, and states at each site only."""
    command = poc_run(tmp_path, phantom, free_port())
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is left running" in done.stdout and "hospital-b" in done.stdout
    assert Deployment(tmp_path / "runtime", PROJECT).processes() == []
    root = tmp_path / "runtime" / "states"
    states = sorted(str(path.relative_to(root)) for path in tmp_path.rglob("state.safetensors"))
    assert [state.split("/")[:3] for state in states] == [[s, "poc", s] for s in ("hospital-a", "hospital-b")]
    # another job does not go on from these states, and nothing is started for it
    before = {path: path.read_bytes() for path in (tmp_path / "runtime").rglob("*.safetensors")}
    other = subprocess.run([*command, "--set", "experts=2"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert other.returncode == 1 and "E25" in other.stderr and "setting experts: 4 then, 2 now" in other.stderr
    assert "starting" not in other.stdout and {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
def test_every_signal_in_the_middle_of_make_poc_stops_everything(
    by: signal.Signals, tmp_path: Path, phantom: list[Path]
) -> None:
    port, said = free_port(), tmp_path / "said.txt"
    how: dict[str, Any] = {
        "cwd": tmp_path,
        "start_new_session": True,
        # a shell that started the tests in the background ignores the signal, and hands that on
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    with said.open("w") as out:
        command = poc_run(tmp_path, phantom, port, "--rounds", "50")
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **how)
    try:
        wait_for(lambda: "round 0" in said.read_text() or process.poll() is not None, 180)
        time.sleep(1)
        process.send_signal(by)
        assert process.wait(timeout=120) == 128 + by
    finally:
        process.kill()
    text = said.read_text()
    assert "nothing is left running" in text and "Traceback" not in text, text
    assert text.splitlines()[-1].startswith(f"stopped by {by.name}. To start again: pfedsam poc run ")
    deployment = Deployment(tmp_path / "runtime", PROJECT, port)
    assert deployment.processes() == []
    deployment.require_free_port()


def test_a_traceback_in_the_servers_log_is_told_by_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "error_log.txt"
    log.write_text(
        "2026-01-01 - x - ERROR - Traceback (most recent call last):\n"
        '  File "a.py", line 1, in <module>\n'
        "ComponentNotAuthorized: class spy is not allowed\n"
    )
    assert JobResult("id", "FINISHED:EXECUTION_EXCEPTION", tmp_path).problem() == (
        "ComponentNotAuthorized: class spy is not allowed"
    )
