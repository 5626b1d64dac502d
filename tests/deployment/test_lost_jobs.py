"""A job that nobody runs is closed; one that runs, or whose end a server still awaits, is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.storage import WORKSPACE
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.lost_jobs import CLOSED, close_jobs, lost_jobs
from pfedsam.errors import PFedSAMError

LOST, RECENT, ENDED = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "123")
NOW = datetime.now(timezone.utc)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A server's kit with two jobs that are RUNNING, of which one has a run folder, and one that has ended."""
    kit = tmp_path / "server"
    for name in ("startup", "local", "jobs", LOST):
        (kit / name).mkdir(parents=True)
    (kit / "startup" / "fed_server.json").write_text("{}")
    manager = {"id": "job_manager", "path": "x", "args": {"uri_root": str(kit / "jobs")}}
    (kit / "local" / "resources.json").write_text(json.dumps({"components": [manager]}))
    (kit / LOST / "log.txt").write_text("what the server wrote\n")
    for job_id, status, started in (
        (LOST, RunStatus.RUNNING, NOW - timedelta(days=1)),
        (RECENT, RunStatus.RUNNING, NOW + timedelta(days=1)),
        (ENDED, RunStatus.FINISHED_COMPLETED, NOW),
    ):
        meta = {JobMetaKey.STATUS.value: status.value, JobMetaKey.START_TIME.value: started.isoformat(), "name": "mine"}
        FilesystemStorage().create_object(str(kit / "jobs" / job_id), b"job", meta)
    return kit


def status(kit: Path, job_id: str) -> str:
    """What the store says of a job."""
    return str(FilesystemStorage().get_meta(str(kit / "jobs" / job_id))[JobMetaKey.STATUS.value])


@contextmanager
def process(*words: str) -> Iterator[None]:
    """A process whose command line has these words, as one of NVFlare has them."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        yield
        running.terminate()


def test_jobs_that_nobody_runs_are_closed_and_what_they_left_is_in_the_store(kit: Path) -> None:
    assert [job.job_id for job in lost_jobs(kit)] == [LOST, RECENT]
    assert [job.job_id for job in close_jobs(kit)] == [LOST, RECENT]
    assert [status(kit, one) for one in (LOST, RECENT, ENDED)] == [CLOSED, CLOSED, "FINISHED:COMPLETED"]
    assert FilesystemStorage().get_data(str(kit / "jobs" / LOST), WORKSPACE)
    assert (kit / LOST / "log.txt").is_file() and lost_jobs(kit) == []


def test_a_server_that_was_started_after_a_job_does_not_run_it(kit: Path) -> None:
    with process("nvflare.private.fed.app.server.server_train", "-m", str(kit)):
        assert [job.job_id for job in lost_jobs(kit)] == [LOST]
        with pytest.raises(PFedSAMError, match=rf"E22.*{RECENT} is run by this server.*abort_job"):
            close_jobs(kit, [LOST, RECENT])
    # nothing was closed
    assert status(kit, LOST) == "RUNNING"


def test_a_job_whose_process_is_there_is_not_lost(kit: Path) -> None:
    with process("nvflare.private.fed.app.server.runner_process", "-m", f"{kit}/", "-n", LOST):
        assert [job.job_id for job in lost_jobs(kit)] == [RECENT]
    # of another server of this machine
    with process("nvflare.private.fed.app.server.runner_process", "-m", str(kit.parent), "-n", LOST):
        assert len(lost_jobs(kit)) == 2


@pytest.mark.parametrize(
    ("job_id", "reason"), [(ENDED, "FINISHED:COMPLETED, so there is nothing to close"), ("nothing", "no job 'nothing'")]
)
def test_a_job_that_is_not_lost_is_named_and_no_other_is_closed(job_id: str, reason: str, kit: Path) -> None:
    with pytest.raises(PFedSAMError, match=f"E22.*{reason}"):
        close_jobs(kit, [LOST, job_id])
    assert status(kit, LOST) == "RUNNING"


def test_the_command_closes_what_is_lost_and_is_content_with_nothing(kit: Path) -> None:
    def close(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["job", "close", "--kit", str(kit), *words])
        return done.exit_code, done.output

    assert close()[0] == 2 and close(LOST, "--all")[0] == 2, "one or the other"
    code, said = close(LOST)
    assert code == 0 and f"{LOST} mine: {CLOSED}; it has left no global model" in said
    assert close("--all")[0] == 0 and status(kit, RECENT) == CLOSED
    assert close("--all") == (0, "no job is lost\n")


def test_a_kit_that_keeps_no_jobs_is_named(kit: Path) -> None:
    (kit / "local" / "resources.json").write_text('{"components": []}')
    with pytest.raises(PFedSAMError, match=r"E01.*resources.json"):
        lost_jobs(kit)
    (kit / "startup" / "fed_server.json").rename(kit / "startup" / "fed_client.json")
    with pytest.raises(PFedSAMError, match=r"E01.*site's kit"):
        lost_jobs(kit)
