"""Three organisations, provisioned from the project file of the guide: no code in jobs, then code in jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import FEDERATION, PROJECT, Federation, change_config, free_port, running
from test_deployment import REFUSED, assert_refused

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.admin import connect
from pfedsam.deployment.audit import audit
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.deployment.site_check import check_kit
from pfedsam.federated.records import CHECKED, SENT_FILE
from pfedsam.files import read_lines
from pfedsam.storage.job_plan import CLIENT, SERVER

pytestmark = pytest.mark.slow
HOSPITALS = PROJECT.with_name("hospitals.yml")
JOBS = Path(__file__).resolve().parents[1] / "jobs"
SITES = ("hospital-north", "hospital-south", "hospital-west")


def _project(folder: Path) -> Path:
    project = folder / "hospitals.yml"
    project.write_text(HOSPITALS.read_text().replace("fl.coordination.example.org", "localhost"))
    return project


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("hospitals")
    phantom = write_phantom(folder / "data", 3, 4, (48, 48, 6))
    with running(folder, phantom, project=_project(folder)) as federation:
        yield federation


def test_three_organisations_run_the_locked_job(hospitals: Federation) -> None:
    result = hospitals.run(hospitals.job(min_clients=3), timeout=300)
    assert result.completed, result.problem()
    states = hospitals.states()
    assert tuple(states) == SITES and all(entry.info["final"] for entry in states.values())
    for site in SITES:
        assert audit(hospitals.deployment.kit(site), result.job_id).problems == []


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_bad_job_is_refused_with_a_reason_and_nobody_trains(hospitals: Federation, name: str) -> None:
    assert_refused(hospitals, name)


@pytest.mark.parametrize("name", SITES)
def test_a_kit_passes_our_check_and_nvflares(hospitals: Federation, name: str) -> None:
    kit = hospitals.deployment.kit(name)
    assert [one for one in check_kit(kit) if not one.fine] == []
    said = hospitals.preflight(name)
    assert "PASSED" in said and "FAILED" not in said, said


def test_the_locked_job_passes_nvflares_validator(hospitals: Federation) -> None:
    from nvflare.fuel.utils.zip_utils import zip_directory_to_bytes
    from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

    job = hospitals.job()
    valid, error, _ = JobMetaValidator().validate(job.name, zip_directory_to_bytes(str(job.parent), job.name))
    assert valid, error


def test_a_job_with_code_that_sends_everything_is_stopped_by_the_sites_own_scope(
    tmp_path: Path, phantom: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No filter and no guard in the job: what stops it is `local/privacy.json` alone."""
    monkeypatch.syspath_prepend(str(JOBS))
    from recorder import RECORD, STATES, Needles, personal_arrays, read_frames, read_items

    leaks = ["plain", "metadata", "headers", "listed", "raw"]
    deployment = Deployment(tmp_path / "runtime", PROJECT, free_port())
    data = dict(zip(deployment.sites, phantom, strict=True))
    deployment.provision()
    deployment.init(data, {"federations": [FEDERATION]}, byoc=True)
    record = tmp_path / "record"
    record.mkdir()
    try:
        told = {RECORD: str(record), STATES: str(tmp_path / "states"), OUTCOME_VARIABLE: "10"}
        deployment.start([deployment.server], told)
        for site in deployment.sites:
            deployment.start([site], {**told, "PFEDSAM_STATE_ROOT": str(deployment.state_root(site))})
        with connect(deployment.admin()) as session:
            deployment.wait(session)
            federation = Federation(deployment, data, session, tmp_path)
            code = [JOBS / "leaky.py", JOBS / "recorder.py"]
            job = federation.job("leaky", rounds=len(leaks), min_clients=1, code=code)
            change_config(job, CLIENT, lambda config: _leaking(config, leaks))
            change_config(job, SERVER, _unguarded)
            result = federation.run(job, timeout=300)
    finally:
        assert deployment.stop() == []
    for site in deployment.sites:
        arrays = [a for path in (tmp_path / "states" / site).iterdir() for a in personal_arrays(path).values()]
        wanted = Needles.of(arrays)
        assert len(wanted) > 1000
        (state,) = deployment.state_root(site).rglob("state.safetensors")
        assert wanted.in_(state.read_bytes()), "the search is not blind"
        kits = [path for path in deployment.kit(deployment.server).rglob("*") if path.is_file()]
        fetched = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
        assert len(kits) > 10 and fetched
        for path in [*kits, *fetched]:
            assert not wanted.in_(path.read_bytes()), path
        assert not wanted.in_(b"".join(read_frames(record)))
        results = [one for one in read_items(record) if one.kind == "result" and one.task == "train"]
        assert any(one.return_code == "OK" for one in results)
        for one in results:
            assert not wanted.in_(one.blob())
            assert not [where for where, value in one.leaves if "notes" in where or isinstance(value, bytes)]
        records = read_lines(deployment.kit(site) / result.job_id / SENT_FILE)
        sent = [one for one in records if one["stage"] == CHECKED and one["task"] == "train"]
        replies = [one["reply"] for one in sent]
        assert replies == ["OK"] * (len(leaks) - 1) + ["SITE_REFUSED:E19"]
        # in the plain way the experts were in the payload; the other ways took them out to hide them elsewhere
        assert sent[0]["excluded"] > 0


def _leaking(config: dict, leaks: list[str]) -> None:
    config["task_result_filters"] = []
    executor = config["executors"][0]["executor"]
    executor.update(path="leaky.LeakyExecutor", args={"learner_id": "learner", "leaks": leaks})
    config["components"][0]["path"] = "leaky.LeakyLearner"
    config["components"].append({"id": "watcher", "path": "recorder.StateWatcher"})


def _unguarded(config: dict) -> None:
    config["task_result_filters"] = []
    config["components"].append({"id": "recorder", "path": "recorder.Recorder"})
