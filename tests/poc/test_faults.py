"""What goes wrong in a hospital, with real processes: every surviving personal state is whole and loadable afterwards.

`Federation.states` reads every state file, so calling it is the check.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import Federation, change_config, free_port, running, wait_for
from misbehaving import WAYS
from nvflare.apis.job_def import RunStatus

from pfedsam.deployment.admin import connect, fetch, follow, resume, submit
from pfedsam.deployment.processes import OUTCOME_VARIABLE
from pfedsam.federated.records import RECEIVED_FILE
from pfedsam.files import read_lines
from pfedsam.storage.global_model import round_of
from pfedsam.storage.job_plan import CLIENT
from pfedsam.storage.site_model import read

SITES = ("hospital-a", "hospital-b")
#: How NVFlare calls a job that went on to its end without a lost site: it depends on whether and when the site comes
#: back, and on whether it was lost in the middle of an upload.
OVER = tuple(
    status.value
    for status in (RunStatus.FINISHED_COMPLETED, RunStatus.FINISHED_ABNORMAL, RunStatus.FINISHED_EXECUTION_EXCEPTION)
)


@pytest.fixture
def own(tmp_path: Path, phantom: list[Path]) -> Iterator[Federation]:
    """A deployment for one test, which may kill its processes."""
    with running(tmp_path, phantom) as federation:
        yield federation


def rounds_done(federation: Federation, job_id: str, rounds: int) -> bool:
    """Whether every site has finished so many rounds."""
    said = f"round {rounds - 1}, phase 'global'"
    return all(said in federation.log_of(site, job_id) for site in SITES)


def test_abort_from_the_console_in_the_middle_of_a_job(federation: Federation) -> None:
    job_id = submit(federation.session, federation.job("long", rounds=200))
    wait_for(lambda: rounds_done(federation, job_id, 2), 120)
    federation.session.abort_job(job_id)
    assert not follow(federation.session, job_id, timeout=60).completed
    wait_for(lambda: all(entry.info["round"] >= 1 for entry in federation.states().values()), 10)
    # the lock was given back: the next job of this federation runs
    again = federation.run(federation.job("after", rounds=1))
    assert again.completed, again.problem()


@pytest.mark.slow
def test_a_site_that_is_killed_while_training_comes_back_for_the_next_job(federation: Federation) -> None:
    """The running job goes on without it: NVFlare hands a job out once, when it starts."""
    job_id = submit(federation.session, federation.job("killed", rounds=4, min_clients=1))
    wait_for(lambda: rounds_done(federation, job_id, 1), 120)
    federation.deployment.kill("hospital-b")
    assert read(federation.states()["hospital-b"].file).personal
    said = federation.log_of("hospital-b", job_id)
    federation.deployment.start(["hospital-b"], {OUTCOME_VARIABLE: "10"})
    result = follow(federation.session, job_id, timeout=240)
    assert result.status in OVER
    assert "round 3, phase 'global'" in federation.log_of("hospital-a", job_id)
    assert federation.states()["hospital-a"].info["final"]
    assert federation.log_of("hospital-b", job_id) == said
    federation.deployment.wait(federation.session)
    again = federation.run(federation.job("next", rounds=1))
    assert again.completed, again.problem()
    assert "personal state of round" in federation.log_of("hospital-b", again.job_id)
    assert federation.states()["hospital-b"].info["final"]


@pytest.mark.slow
def test_a_corrupted_personal_state_is_named_and_the_one_before_it_is_used(federation: Federation) -> None:
    first = federation.run(federation.job("first", rounds=1))
    assert first.completed, first.problem()
    state = federation.states()["hospital-b"].file
    state.write_bytes(state.read_bytes()[:-100])
    second = federation.run(federation.job("second", rounds=1))
    assert second.completed, second.problem()
    log = federation.log_of("hospital-b", second.job_id)
    assert "E13" in log and str(state) in log and "Trying the state before it" in log
    assert "personal state of round" in log
    assert federation.states()["hospital-b"].info["final"]


@pytest.mark.slow
def test_a_server_that_was_killed_goes_on_from_its_last_round_by_resume(own: Federation) -> None:
    job = own.job("long", rounds=200)
    job_id = submit(own.session, job)
    wait_for(lambda: rounds_done(own, job_id, 2), 120)
    server = own.deployment.server
    own.deployment.kill(server)
    model = next(own.deployment.kit(server).glob(f"{job_id}/**/global_model.safetensors"))
    done = round_of(model) + 1
    before = {site: int(entry.info["round"]) for site, entry in own.states().items()}
    assert done >= 1 and min(before.values()) >= done - 1
    kept = own.folder / "kept.safetensors"
    kept.write_bytes(model.read_bytes())
    for site in SITES:
        own.deployment.kill(site)
    own.deployment.start()
    with connect(own.deployment.admin()) as session:
        own.deployment.wait(session)
        again = resume(session, job, kept, rounds=done + 2)
        follow(session, again, timeout=180)
        result = fetch(session, again, own.folder / "results")
        assert result.completed, result.problem()
        # as if it was lost after the last round: no round is left, the final personal phase is
        last = resume(session, job, result.file("global_model.safetensors") or Path(), rounds=done + 2)
        assert follow(session, last, timeout=180).completed
    for site, entry in own.states().items():
        assert entry.info["final"] and entry.info["round"] == done + 2
        assert "final personal phase" in own.log_of(site, last) and ", phase 'global'" not in own.log_of(site, last)
        log = own.log_of(site, again)
        assert "personal state of round" in log and f"round {done}, phase" in log and "round 0, phase" not in log


@pytest.mark.slow
def test_a_site_that_is_killed_for_good_does_not_stop_the_others(own: Federation) -> None:
    job_id = submit(own.session, own.job("long", rounds=4, min_clients=1))
    wait_for(lambda: rounds_done(own, job_id, 1), 120)
    own.deployment.kill("hospital-b")
    assert follow(own.session, job_id, timeout=300).status in OVER
    assert "round 3, phase 'global'" in own.log_of("hospital-a", job_id)
    states = own.states()
    assert states["hospital-a"].info["final"]
    assert read(states["hospital-b"].file).personal
    # it comes back, and takes part in the next job from its own state
    own.deployment.start(["hospital-b"])
    own.deployment.wait(own.session)
    again = own.run(own.job("after", rounds=1))
    assert again.completed, again.problem()
    assert "personal state of round" in own.log_of("hospital-b", again.job_id)


class Proxy:
    """A loopback proxy that can cut all its connections."""

    def __init__(self, target: int) -> None:
        self.target, self.open = target, True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        self.open = False
        for pair in self.pairs:
            for side in pair:
                side.close()
        self.pairs.clear()

    def mend(self) -> None:
        """Let connections through again."""
        self.open = True

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            if not self.open:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except ConnectionRefusedError:
                # the server is not there yet: the site will come again
                near.close()
                continue
            self.pairs.append((near, far))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
        except OSError:
            pass
        finally:
            for side in (one, other):
                side.close()


@pytest.mark.slow
def test_a_connection_that_is_cut_for_half_a_minute(tmp_path: Path, phantom: list[Path]) -> None:
    port = free_port()
    proxy = Proxy(port)
    with running(tmp_path, phantom, port=port, client_port=proxy.port) as federation:
        job_id = submit(federation.session, federation.job("long", rounds=12))
        wait_for(lambda: rounds_done(federation, job_id, 2), 120)
        proxy.cut()
        time.sleep(30)
        proxy.mend()
        result = follow(federation.session, job_id, timeout=400)
        assert result.completed
        assert all(entry.info["final"] for entry in federation.states().values())


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving_keeps_the_last_state(own: Federation) -> None:
    """A limit on the size of files stands for the disk: a state cannot be written, the one before stays whole."""
    first = own.run(own.job("first", rounds=1))
    assert first.completed, first.problem()
    kept = {site: entry.file.read_bytes() for site, entry in own.states().items()}
    own.deployment.kill("hospital-b")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept["hospital-b"]) // 2, hard))
    try:
        own.deployment.start(["hospital-b"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    own.deployment.wait(own.session)
    second = own.run(own.job("second", rounds=1, min_clients=1), timeout=300)
    assert second.job_id
    assert own.states()["hospital-b"].file.read_bytes() == kept["hospital-b"]
    assert "E13" in own.log_of("hospital-b", second.job_id)


def spoiled(federation: Federation, name: str, ways: list[str], min_clients: int) -> Path:
    """A job whose results hospital-b spoils, round by round, after the project's own filter."""
    code = Path(__file__).with_name("misbehaving.py")
    job = federation.job(name, rounds=len(ways), min_clients=min_clients, wait=120, code=[code])
    spoil = {"path": "misbehaving.Spoil", "args": {"site": "hospital-b", "ways": ways}}
    change_config(job, CLIENT, lambda c: c["task_result_filters"][0]["filters"].append(spoil))
    return job


@pytest.mark.slow
def test_a_site_that_sends_nonsense_is_named_and_the_others_keep_their_time(
    tmp_path: Path, phantom: list[Path]
) -> None:
    """Every way in one job, which goes on with the other site; with both wanted, the job stops instead."""
    ways = list(WAYS)
    with running(tmp_path, phantom, byoc=True) as federation:
        result = federation.run(spoiled(federation, "goes-on", ways, 1), timeout=400)
        assert result.completed, result.problem()
        log = (result.file("log.txt") or Path()).read_text()
        refused = [line for line in log.splitlines() if "result of site hospital-b refused: E20" in line]
        assert len(refused) == len(ways)
        for line, way in zip(refused, ways, strict=True):
            assert WAYS[way] in line, (way, line)
        records = [one for one in read_lines(result.file(RECEIVED_FILE) or Path()) if one["task"] == "train"]
        accepted = [one["round"] for one in records if one["client"] == "hospital-a" and one["accepted"]]
        assert accepted == list(range(len(ways)))
        assert not [one for one in records if one["client"] == "hospital-b" and one["accepted"]]
        assert all(entry.info["final"] for entry in federation.states().values())
        kept = {site: read(entry.file) for site, entry in federation.states().items()}
        stopped = federation.run(spoiled(federation, "stops", ["not a number"], 2), timeout=200)
        assert not stopped.completed
        assert "E20" in stopped.problem()
        assert set(federation.states()) == set(kept)
