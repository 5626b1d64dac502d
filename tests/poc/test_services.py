"""Server and sites as the guide's service files run them: the console's restart and shutdown, and a lost server.

Real processes of NVFlare; what systemd would do is done by `service.Service`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import FEDERATION, PROJECT, Federation, free_port, wait_for
from nvflare.apis.job_def import JobMetaKey
from service import FILES, Service

from pfedsam.deployment.admin import connect, fetch, follow, resume, submit
from pfedsam.deployment.lost_jobs import CLOSED, close_jobs, lost_jobs
from pfedsam.deployment.processes import Deployment
from pfedsam.errors import PFedSAMError
from pfedsam.storage.global_model import round_of

pytestmark = pytest.mark.slow
#: Seconds for what takes a few on a machine that does nothing else.
LONG = 400


class Services:
    """A deployment whose participants are services.

    Attributes:
        deployment: its kits.
        running: the service of each participant.
    """

    def __init__(self, folder: Path, data: list[Path]) -> None:
        self.folder = folder
        self.deployment = Deployment(folder / "runtime", PROJECT, free_port())
        self.deployment.provision()
        self.deployment.init(dict(zip(self.deployment.sites, data, strict=True)), {"federations": [FEDERATION]})
        self.running: dict[str, Service] = {}
        for name in (self.deployment.server, *self.deployment.sites):
            side = "server" if name == self.deployment.server else "site"
            unit = FILES / side / f"pfedsam-{side}.service"
            home = folder / "homes" / name
            self.running[name] = Service(unit, self.deployment.kit(name), home, {"OMP_NUM_THREADS": "1"})

    def server_is_up(self, times: int) -> None:
        """Wait until the server was started so many times: NVFlare's session can hang if it tries in that moment."""
        log = self.running[self.deployment.server].log
        wait_for(lambda: log.exists() and log.read_text().count("Server started") == times, LONG)

    def stop(self) -> None:
        """End everything."""
        for service in self.running.values():
            service.stop()
        assert self.deployment.stop() == []
        self.deployment.require_free_port()


@pytest.fixture
def services(tmp_path: Path, phantom: list[Path]) -> Iterator[Services]:
    found = Services(tmp_path, phantom)
    try:
        yield found
    finally:
        found.stop()


def test_a_restart_from_the_console_starts_the_service_again_and_a_shutdown_leaves_it_off(services: Services) -> None:
    deployment, site = services.deployment, services.running["hospital-b"]
    services.server_is_up(1)
    with connect(deployment.admin(), timeout=LONG) as session:
        deployment.wait(session, LONG)
        session.restart("client", ["hospital-b"], wait=False)
        wait_for(lambda: site.codes == [75], LONG)
        wait_for(lambda: site.log.read_text().count("Successfully registered client:hospital-b") == 2, LONG)
        assert site.active
        session.shutdown("client", ["hospital-b"], wait=False)
        wait_for(lambda: not site.active, LONG)
        assert site.codes == [75, 0]
        session.restart("server", wait=False)
    server = services.running[deployment.server]
    wait_for(lambda: server.codes == [75], LONG)
    services.server_is_up(2)
    with connect(deployment.admin(), timeout=LONG) as session:
        # the other site has stayed, or its service has started it again
        wait_for(lambda: "hospital-a" in {one.name for one in session.get_connected_client_list()}, LONG)
    assert services.running["hospital-a"].active


def test_the_job_of_a_server_that_was_lost_is_closed_and_goes_on_by_resume(services: Services) -> None:
    deployment = services.deployment
    kit, server = deployment.kit(deployment.server), services.running[deployment.server]
    services.server_is_up(1)
    with connect(deployment.admin(), timeout=LONG) as session:
        deployment.wait(session, LONG)
        federation = Federation(deployment, {}, session, services.folder)
        job = federation.job("long", rounds=200)
        job_id = submit(session, job)
        wait_for(lambda: bool([*kit.glob(f"{job_id}/**/global_model.safetensors")]), LONG)
        # it is run: nobody may close it
        assert lost_jobs(kit) == []
        with pytest.raises(PFedSAMError, match=rf"E22.*{job_id} is run by this server.*abort_job"):
            close_jobs(kit, [job_id])
    server.kill()
    wait_for(lambda: f"{job_id} pfedsam: {CLOSED}; its last global model" in server.log.read_text(), LONG)
    services.server_is_up(2)
    with connect(deployment.admin(), timeout=LONG) as session:
        deployment.wait(session, LONG)
        assert session.get_job_meta(job_id)[JobMetaKey.STATUS.value] == CLOSED
        # what it has left can be fetched from anywhere, and the job goes on from it
        model = fetch(session, job_id, services.folder / "results").file("global_model.safetensors")
        assert model is not None
        done = round_of(model) + 1
        again = resume(session, job, model, rounds=done + 1)
        assert follow(session, again, timeout=LONG).completed
        session.delete_job(job_id)
    for site, entry in federation.states().items():
        assert entry.info["final"] and entry.info["round"] == done + 1
        assert f"round {done}, phase" in federation.log_of(site, again)
