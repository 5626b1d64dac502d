"""What an administrator does: submit a job, follow it, fetch its result, resume it. Over NVFlare's FLARE API."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.dxo import DXO
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.fuel.flare_api.api_spec import AuthorizationError, JobNotDone, JobNotFound
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.fuel.utils.fobs import fobs as serialiser

from pfedsam.deployment.job_log import refusal
from pfedsam.deployment.jobs import export_job
from pfedsam.errors import REFUSED, ErrorCode, PFedSAMError
from pfedsam.storage.global_model import round_of

_BY_SITE = re.compile(rf"\b{REFUSED}:(E\d\d)\b")
_OURS = re.compile(r"\bE\d\d\b")
#: Tokens, signatures and keys; no path or host name has so long a part.
_SECRET = re.compile(r"[A-Za-z0-9+_=-]{48,}")
_LONGEST_REASON = 200
NO_REASON = "no reason reached the server; a site may have refused to start it, see its error_log.txt"
#: What helps who may not download a job: NVFlare gives its result to whom it belongs.
_HAND_OVER = (
    "It is for who submitted the job, an org_admin of the same organisation, and the project administrator: let one of "
    "them hand over the file best_global_model.safetensors of the result, and give `pfedsam pull` that file."
)


@dataclass(frozen=True)
class JobResult:
    """A finished job.

    Attributes:
        job_id: of NVFlare.
        status: NVFlare's last status, for example `FINISHED:COMPLETED`.
        folder: where its result was written to; None if nothing was fetched, or there is nothing.
        refusals: what server and sites said when the job was handed out.
    """

    job_id: str
    status: str
    folder: Path | None = None
    refusals: tuple[str, ...] = ()

    @property
    def completed(self) -> bool:
        """Whether it ended as it should."""
        return self.status == RunStatus.FINISHED_COMPLETED.value

    def file(self, name: str) -> Path | None:
        """A file of the result by its name, or None."""
        return next(iter(sorted(self.folder.rglob(name))), None) if self.folder else None

    def problem(self) -> str:
        """The first error in the server's log of the job: an error of ours, a code that a site sent, else any."""
        log = self.file("error_log.txt") or self.file("log.txt")
        lines = log.read_text(errors="replace").splitlines() if log else []
        errors = _errors(lines)
        own_errors = [line for line in errors if _OURS.search(line)]
        first = next(iter([*own_errors, *self.refusals, *errors]), NO_REASON)
        code = _BY_SITE.search(first)
        return f"{first} ({refusal(code[1])})" if code else first


def _errors(lines: Sequence[str]) -> list[str]:
    """The messages of the errors in a log; of a traceback its last line, which says what it was."""
    messages = []
    for number, line in enumerate(lines):
        if " - ERROR - " not in line:
            continue
        message = line.split(" - ERROR - ", 1)[-1]
        if message.startswith("Traceback"):
            after = (text for text in lines[number + 1 :] if text and not text[0].isspace())
            message = next(after, message)
        messages.append(message)
    return messages


@contextmanager
def connect(kit: Path, timeout: float = 60.0) -> Iterator[Session]:
    """A session of an administrator; it is closed at the end, without which the process would hang.

    Args:
        kit: startup kit of the administrator; the folder's name is the user.
        timeout: seconds to wait for the server.

    Raises:
        PFedSAMError: E01 if it is no administrator's kit, E22 with the last reason if the server does not answer.
    """
    if not (kit / "startup" / "fed_admin.json").is_file():
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{kit} is no startup kit of an administrator.", "Give the folder above startup/."
        )
    kit = kit.resolve()
    # the shell script makes this folder; the API does not
    (kit / "transfer").mkdir(exist_ok=True)
    _register_types()
    until = time.monotonic() + timeout
    while True:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                session = new_secure_session(kit.name, str(kit), timeout=10)
            break
        except Exception as error:
            if time.monotonic() > until:
                raise PFedSAMError(
                    ErrorCode.DEPLOYMENT,
                    f"the server does not answer {kit.name}: {reason_of(error)}.",
                    "Is it running?",
                ) from None
            time.sleep(1)
    try:
        yield session
    finally:
        session.close()


def reason_of(error: BaseException) -> str:
    """Class and first line of an error, without anything that looks like a token or a key."""
    line = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {_SECRET.sub('...', line)[:_LONGEST_REASON].rstrip('.')}"


def _register_types() -> None:
    """Tell NVFlare's serialiser how its own types are written, whatever this process did before.

    NVFlare registers them when a session connects. If the process has serialised a `Shareable` before that, the
    serialiser has already taken it for a plain class, keeps that, and loses what is in it: the server's certificate
    arrives as None and every login ends in a TypeError.
    """
    if not getattr(flare_decomposers.register, "registered", False):
        for known in (Shareable, DXO):
            getattr(serialiser, "_decomposers", {}).pop(f"{known.__module__}.{known.__qualname__}", None)
        flare_decomposers.register()


def submit(session: Session, job: Path) -> str:
    """Submit a copy of a job folder (NVFlare writes signatures into what it submits).

    Returns:
        The job's id.

    Raises:
        PFedSAMError: E22 with the server's reason if it refuses the job.
    """
    with tempfile.TemporaryDirectory(prefix="pfedsam-job-") as scratch:
        copy = Path(shutil.copytree(job, Path(scratch) / job.name))
        try:
            return session.submit_job(str(copy))
        except Exception as error:
            raise PFedSAMError(
                ErrorCode.DEPLOYMENT,
                f"the server refuses the job: {error}.",
                "See poc_workspace/joining.md, the console: which roles may submit.",
            ) from None


def follow(
    session: Session,
    job_id: str,
    event: Callable[[str], None] | None = None,
    timeout: float = 0,
    interval: float = 1.0,
    look: Callable[[], None] | None = None,
) -> JobResult:
    """Wait until a job ends.

    Args:
        session: of an administrator.
        job_id: of the job.
        event: called with a line whenever its status changes.
        timeout: seconds, 0 for no limit.
        interval: seconds between two looks.
        look: called at each look.

    Raises:
        PFedSAMError: E22 if it is not finished after `timeout` seconds.
    """
    started, last = time.monotonic(), ""
    while True:
        meta = session.get_job_meta(job_id)
        status = str(meta.get(JobMetaKey.STATUS.value, ""))
        if status != last and event:
            event(f"{job_id[:8]}: {status}")
        last = status
        if look:
            look()
        if status.startswith("FINISHED"):
            return JobResult(job_id, status)
        if timeout and time.monotonic() - started > timeout:
            raise PFedSAMError(
                ErrorCode.DEPLOYMENT, f"job {job_id} is {status} after {timeout:.0f} s.", "Look at the server's log."
            )
        time.sleep(interval)


def fetch(session: Session, job_id: str, out: Path) -> JobResult:
    """Download the result of a job to `out/<job id>`, and what was said of it.

    Raises:
        PFedSAMError: E22 if this administrator may not have it, there is no such job, or it has not ended.
    """
    with _answered(job_id):
        meta = session.get_job_meta(job_id)
    status = str(meta.get(JobMetaKey.STATUS.value, ""))
    refusals = [line for line in meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or () if not str(line).endswith("OK")]
    out.mkdir(parents=True, exist_ok=True)
    target: Path | None = out / job_id
    with _answered(job_id):
        try:
            result = session.download_job_result(job_id)
            shutil.rmtree(out / job_id, ignore_errors=True)
            shutil.move(result, out / job_id)
        except (AuthorizationError, JobNotDone):
            raise
        except Exception:
            # a job that never ran has no result
            target = None
    return JobResult(job_id, status, target, tuple(str(line) for line in refusals))


@contextmanager
def _answered(job_id: str) -> Iterator[None]:
    """What the server says of a job that it does not hand out, as an error of ours (E22)."""
    try:
        yield
    except AuthorizationError:
        message = f"not authorised: the server's policy does not give this administrator the result of job {job_id}."
        raise PFedSAMError(ErrorCode.DEPLOYMENT, message, _HAND_OVER) from None
    except JobNotDone:
        message = f"job {job_id} has not ended."
        raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "`pfedsam job watch` follows it.") from None
    except JobNotFound:
        message = f"the server has no job {job_id}."
        raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "`list_jobs` in NVFlare's console names the jobs.") from None


def resume(session: Session, job: Path, global_model: Path, rounds: int) -> str:
    """Submit a job again from a global model of its own: each site goes on from its own personal state.

    Args:
        session: of an administrator.
        job: the job folder as it was submitted.
        global_model: the last global model that was saved; it is carried in the job, and read without pickle.
        rounds: of the whole federation.

    Returns:
        The new job's id.

    Raises:
        PFedSAMError: E10 if the model cannot be read, E32 if more rounds are done than were asked for, E22 if the
            server refuses the job.
    """
    with tempfile.TemporaryDirectory(prefix="pfedsam-resume-") as scratch:
        return submit(session, resumed_job(job, Path(scratch) / job.name, global_model, rounds))


def resumed_job(job: Path, out: Path, global_model: Path, rounds: int) -> Path:
    """Write the job that does what is left: the rounds that were not done, the final personal phase, the evaluation.

    Args:
        job: the job folder as it was submitted.
        out: folder to write.
        global_model: the last global model that was saved.
        rounds: of the whole federation; if all are done, the final personal phase is left.

    Raises:
        PFedSAMError: E10 if the model cannot be read, E32 if more rounds are done than were asked for.
    """
    done = round_of(global_model) + 1
    if done > rounds:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION, f"{done} rounds are done, {rounds} were asked for.", "Ask for more rounds."
        )
    return export_job(job, out, server={"num_rounds": rounds - done, "start_round": done}, theta0=global_model)
