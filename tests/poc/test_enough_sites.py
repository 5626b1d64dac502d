"""Three hospitals as real processes, of which one is killed in the middle of a job: it is named, or the job ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import FEDERATION, PROJECT, Federation, free_port, wait_for

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.admin import JobResult, connect, fetch, follow, submit
from pfedsam.deployment.kits import RESOURCES
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.federated.records import SITES_FILE
from pfedsam.federated.rounds import attendance, remarks
from pfedsam.files import read_lines
from pfedsam.storage.global_model import round_of

pytestmark = pytest.mark.slow
LOST = "hospital-west"
LONG = 500
#: A lost site is found sooner than in a real federation.
SOON = {
    OUTCOME_VARIABLE: "10",
    "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "5",
    "NVFLARE_DEAD_CLIENT_CHECK_LEAD_TIME": "5",
}


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("hospitals")
    data = write_phantom(folder / "data", 3, 4, (48, 48, 6))
    project = folder / "hospitals.yml"
    text = PROJECT.with_name("hospitals.yml").read_text()
    project.write_text(text.replace("fl.coordination.example.org", "localhost"))
    deployment = Deployment(folder / "runtime", project, free_port())
    deployment.provision()
    deployment.init(dict(zip(deployment.sites, data, strict=True)), {"federations": [FEDERATION]})
    resources = deployment.kit(deployment.server) / "local" / RESOURCES
    content = json.loads(resources.read_text())
    content["servers"][0]["heart_beat_timeout"] = 20
    resources.write_text(json.dumps(content))
    try:
        deployment.start(environment=SOON)
        with connect(deployment.admin()) as session:
            yield Federation(deployment, {}, session, folder)
    finally:
        assert deployment.stop() == []
        deployment.require_free_port()


def without_one(hospitals: Federation, name: str, rounds: int, min_clients: int) -> JobResult:
    """The result of a job in which a site is killed after the first round; it is back afterwards."""
    deployment, session = hospitals.deployment, hospitals.session
    deployment.wait(session, LONG)
    job_id = submit(session, hospitals.job(name, rounds=rounds, min_clients=min_clients, wait=5))
    records = deployment.kit(deployment.server) / job_id / SITES_FILE
    wait_for(lambda: bool(read_lines(records)), LONG)
    deployment.kill(LOST)
    try:
        follow(session, job_id, timeout=LONG)
    finally:
        deployment.start([LOST], SOON)
    return fetch(session, job_id, hospitals.folder / "results")


def test_a_site_that_is_lost_is_named_and_the_others_go_on(hospitals: Federation) -> None:
    result = without_one(hospitals, "two-are-enough", rounds=4, min_clients=2)
    records = result.file(SITES_FILE)
    assert records is not None
    lines = read_lines(records)
    assert [one["round"] for one in lines] == [0, 1, 2, 3]
    assert lines[0]["missing"] == [] and lines[3]["missing"] == [LOST] and len(lines[3]["sites"]) == 2
    log = (result.file("log.txt") or Path()).read_text()
    assert "2 of 3 sites took part: hospital-north, hospital-south; missing: hospital-west" in log
    assert "hospital-north 4 of 4 rounds" in attendance([records.parent])
    assert any(one.startswith(f"{LOST}: it was missing") and "3" in one for one in remarks([records.parent]))


def test_a_job_that_asks_for_three_sites_ends_when_one_is_lost_and_no_round_of_two_counts(
    hospitals: Federation,
) -> None:
    result = without_one(hospitals, "three-or-none", rounds=50, min_clients=3)
    assert not result.completed
    assert "Alive clients 2 < required min 3" in (result.file("log.txt") or Path()).read_text()
    records, model = result.file(SITES_FILE), result.file("global_model.safetensors")
    assert records is not None and model is not None
    full = [one["round"] for one in read_lines(records) if not one["missing"]]
    assert round_of(model) == max(full) < 49
