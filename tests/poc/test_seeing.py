"""What an administrator sees of a job, and who may see it: by the answers of real servers and sites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvflare
import pytest
from deployed import FEDERATION, Federation, free_port, wait_for
from test_hospitals import HOSPITALS

from pfedsam import __version__
from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.admin import connect, fetch, follow, submit
from pfedsam.deployment.job_view import JobView, Viewer
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.deployment.site_versions import nvflare_versions, require_same_nvflare
from pfedsam.errors import PFedSAMError
from pfedsam.inference.pair import pair
from pfedsam.storage.global_model import round_of

pytestmark = pytest.mark.slow
SITES = ("hospital-north", "hospital-south", "hospital-west")
OTHER = "99.0"
LEAD, IT = "lead@north.example.org", "it@south.example.org"
LONG = 600


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three organisations; hospital-west has another version of pfedsam."""
    folder = tmp_path_factory.mktemp("seeing")
    project = folder / "hospitals.yml"
    project.write_text(HOSPITALS.read_text().replace("fl.coordination.example.org", "localhost"))
    deployment = Deployment(folder / "runtime", project, free_port())
    data = dict(zip(SITES, write_phantom(folder / "data", 3, 4, (48, 48, 6)), strict=True))
    deployment.provision()
    deployment.init(data, {"federations": [FEDERATION]})
    # as an installation of another version would: the number that its package names
    changed = folder / "other" / "sitecustomize.py"
    changed.parent.mkdir()
    changed.write_text(f"import pfedsam\npfedsam.__version__ = {OTHER!r}\n")
    try:
        told = {OUTCOME_VARIABLE: "10"}
        deployment.start([deployment.server, *SITES[:2]], told)
        deployment.start([SITES[2]], {**told, "PYTHONPATH": str(changed.parent)})
        with connect(deployment.admin(), timeout=LONG) as session:
            deployment.wait(session, LONG)
            yield Federation(deployment, data, session, folder)
    finally:
        assert deployment.stop() == []
        deployment.require_free_port()


def _kit(hospitals: Federation, name: str) -> Path:
    return hospitals.deployment.kit(name)


def _command(hospitals: Federation, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pfedsam.cli", *words]
    environment = {**os.environ, "COLUMNS": "200", "HOME": str(hospitals.deployment.root / "home")}
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, env=environment)


@pytest.fixture(scope="module")
def watched(hospitals: Federation) -> tuple[str, list[JobView]]:
    """A job that runs to its end at two sites, as it was seen on the way."""
    session, views = hospitals.session, list[JobView]()
    job_id = submit(session, hospitals.job(rounds=3, min_clients=2, wait=120))
    viewer = Viewer(session, job_id)

    def look() -> bool:
        views.append(viewer.look())
        return views[-1].ended

    wait_for(look, LONG)
    return job_id, views


def test_a_job_is_seen_while_it_runs(hospitals: Federation, watched: tuple[str, list[JobView]]) -> None:
    running = [view for view in watched[1] if view.status == "RUNNING" and view.seen.closed is not None]
    assert running and all(view.end == 3 and not view.hidden for view in running)
    assert {view.workflow for view in running} & {"scatter_and_gather", "final_personal_phase", "global_model_eval"}
    assert any(view.left() for view in running), [view.seen.closed for view in running]
    last = watched[1][-1]
    assert last.left() is None and last.connected == set(SITES)
    north = last.seen.sites[SITES[0]]
    assert north.rounds == 3 and north.last == 2 and north.final == "done"
    assert north.cases and north.norm and north.share and north.dice is not None


def test_a_site_of_another_version_is_refused_with_a_code_at_once_and_reads_no_data(
    hospitals: Federation, watched: tuple[str, list[JobView]]
) -> None:
    job_id, views = watched
    west = views[-1].seen.sites[SITES[2]]
    assert west.problem == "E22" and west.rounds == 0 and west.missing == [0, 1, 2]
    log = hospitals.log_of(SITES[2], job_id)
    assert (
        f"the server runs 'pfedsam {__version__}, nvflare {nvflare.__version__}'; this site has pfedsam {OTHER}" in log
    )
    assert "validation cases" not in log and SITES[2] not in hospitals.states()
    # what reaches the server is the code alone
    kit = _kit(hospitals, hospitals.deployment.server)
    assert not [path for path in kit.rglob("*") if path.is_file() and OTHER.encode() in path.read_bytes()]


def test_the_command_shows_the_job_to_whom_it_belongs_and_the_rounds_alone_to_others(
    hospitals: Federation, watched: tuple[str, list[JobView]]
) -> None:
    job_id = watched[0]
    ours = _command(hospitals, "job", "watch", job_id, "--admin", str(hospitals.deployment.admin()))
    assert job_id in ours.stdout and "3 of 3" in ours.stdout and "refused: E22" in ours.stdout, (
        ours.stdout + ours.stderr
    )
    assert ours.returncode == (0 if watched[1][-1].completed else 1)
    others = _command(hospitals, "job", "watch", job_id, "--once", "--admin", str(_kit(hospitals, IT)))
    assert "not shown to this administrator: its log" in others.stdout, others.stdout + others.stderr
    assert "E22" not in others.stdout and "norm" in others.stdout and "3 of 3" not in others.stdout
    unknown = _command(hospitals, "job", "watch", "a" * 8 + job_id[8:], "--admin", str(hospitals.deployment.admin()))
    assert unknown.returncode == 1 and "E22" in unknown.stderr and "no job" in unknown.stderr


def test_every_site_tells_nvflares_version_and_a_site_of_another_is_named(
    hospitals: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = dict.fromkeys(("server", *SITES), nvflare.__version__)
    assert nvflare_versions(hospitals.session) == require_same_nvflare(hospitals.session) == everywhere
    for name in (LEAD, IT):
        with connect(_kit(hospitals, name), timeout=LONG) as session:
            assert nvflare_versions(session) == everywhere
    answer = {site: {"version": version} for site, version in {**everywhere, SITES[1]: "2.7.0"}.items()}
    monkeypatch.setattr(hospitals.session, "report_version", lambda _: answer)
    with pytest.raises(PFedSAMError, match=rf"E22.*{nvflare.__version__}.*{SITES[1]} 2\.7\.0"):
        require_same_nvflare(hospitals.session)


def test_a_site_tells_nothing_but_the_version(hospitals: Federation) -> None:
    session = hospitals.session
    for ask in (
        lambda: session.cat_target(SITES[0], file="local/pfedsam.json"),
        lambda: session.ls_target(SITES[0]),
        lambda: session.tail_target_log(SITES[0]),
    ):
        with pytest.raises(Exception, match=r"(?i)not.authorized|authorization"):
            ask()


def test_no_log_of_a_site_is_at_the_server(hospitals: Federation, watched: tuple[str, list[JobView]]) -> None:
    logs = hospitals.session.get_job_logs(watched[0], "all")
    assert list(logs["logs"]) == ["server"]
    data = [str(path) for path in hospitals.data.values()]
    assert not any(path in logs["logs"]["server"] for path in data)


def test_who_may_not_download_is_told_so_and_pairs_the_file_that_is_handed_over(
    hospitals: Federation, watched: tuple[str, list[JobView]], tmp_path: Path
) -> None:
    job_id = watched[0]
    state = hospitals.states()[SITES[1]].file
    for name in (LEAD, IT):
        words = (job_id, str(state), str(tmp_path / "m"), "--admin", str(_kit(hospitals, name)))
        refused = _command(hospitals, "pull", *words)
        assert refused.returncode == 1, refused.stdout
        assert "E22" in refused.stderr and "not authorised" in refused.stderr, refused.stderr
        assert "hand over the file best_global_model.safetensors" in " ".join(refused.stderr.split())
    file = fetch(hospitals.session, job_id, tmp_path / "results").file("global_model.safetensors")
    assert file is not None and round_of(file) == 2
    done = _command(hospitals, "pull", str(file), str(state), str(tmp_path / "model.safetensors"))
    assert done.returncode == 0, done.stderr
    assert pair(file, state).info["round"] == 3
    neither = _command(hospitals, "pull", job_id, str(state), str(tmp_path / "n"))
    assert neither.returncode == 2 and "--admin" in neither.stderr


def test_a_lead_follows_and_fetches_the_job_that_she_has_submitted(hospitals: Federation, tmp_path: Path) -> None:
    with connect(_kit(hospitals, LEAD), timeout=LONG) as session:
        job_id = submit(session, hospitals.job("of-lead", rounds=1, min_clients=2, wait=120))
        follow(session, job_id, timeout=LONG)
        view = Viewer(session, job_id).look()
        assert not view.hidden and view.seen.sites[SITES[0]].norm
        assert fetch(session, job_id, tmp_path).file("global_model.safetensors") is not None
    told: dict[str, Any] = json.loads((_kit(hospitals, SITES[0]) / "local" / "authorization.json").read_text())
    assert told["permissions"]["lead"]["report_version"] == "any"
