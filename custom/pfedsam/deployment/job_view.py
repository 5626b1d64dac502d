"""A job as an administrator sees it while it runs, or after it: by what NVFlare's server answers this administrator.

| asked | right in the server's `local/authorization.json` | tells |
|---|---|---|
| `get_job_meta`, `check_status` | `view` | status, sites, who is connected |
| `show_stats` | `view` | round and number of rounds, workflow |
| `get_job_log` of the server | as `download_job`, see `kits` | who took part, norms, Dice, refusals |

Nothing is asked of a site. What is not answered is left out, and said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nvflare.apis.job_def import SERVER_SITE_NAME, JobMetaKey, RunStatus
from nvflare.fuel.flare_api.api_spec import AuthorizationError, JobNotFound
from nvflare.fuel.flare_api.flare_api import Session

from pfedsam.deployment.admin import reason_of
from pfedsam.deployment.job_log import JobSeen, read_job_log
from pfedsam.errors import ErrorCode, PFedSAMError

#: What NVFlare writes above the rest of a log that is too long for it.
_CUT = "... output truncated"
_T = TypeVar("_T")


@dataclass(frozen=True)
class JobView:
    """A job at one moment.

    Attributes:
        job_id, name, status: of NVFlare; the status begins with `FINISHED` when it has ended.
        workflow: the part of the job that runs now; empty if none does.
        rounds: that this job trains, None if the server does not say.
        seen: by the server's log of the job.
        cut: whether NVFlare has left out the beginning of a log of more than 5 MB.
        connected: names of the sites that are connected now, None if the server does not say.
        waited: seconds since the last line of the log was seen first.
        hidden: what this administrator may not see.
    """

    job_id: str
    name: str
    status: str
    workflow: str = ""
    rounds: int | None = None
    seen: JobSeen = field(default_factory=JobSeen)
    cut: bool = False
    connected: frozenset[str] | None = None
    waited: float = 0.0
    hidden: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.status.startswith("FINISHED")

    @property
    def completed(self) -> bool:
        """Whether it ended as it should."""
        return self.status == RunStatus.FINISHED_COMPLETED.value

    @property
    def end(self) -> int | None:
        """Number of the last round plus one, None if it is not known."""
        return None if self.rounds is None else (0 if self.cut else self.seen.first or 0) + self.rounds

    def left(self) -> float | None:
        """Seconds until the last round is over, None if it is not known."""
        return None if self.end is None or self.ended else self.seen.left(self.end, self.waited)


class Viewer:
    """Looks at one job, again and again.

    Args:
        session: of an administrator.
        job_id: of NVFlare.
    """

    def __init__(self, session: Session, job_id: str) -> None:
        self.session, self.job_id = session, job_id
        self._rounds: int | None = None
        self._last, self._last_at = 0.0, 0.0

    def look(self) -> JobView:
        """The job now.

        Raises:
            PFedSAMError: E22 if there is no such job, this administrator may not see it, or the server does not answer.
        """
        meta = self._meta()
        status = str(meta.get(JobMetaKey.STATUS.value, ""))
        hidden: list[str] = []
        running = status == RunStatus.RUNNING.value
        stats: dict[str, dict[str, Any]] = {}
        if running:
            stats = self._asked("its progress", self._stats, stats, hidden)
        text = self._asked("its log: sites, norms and Dice", self._log, "", hidden)
        connected = self._asked("who is connected", self._connected, None, hidden)
        seen = read_job_log(text.splitlines(), _names(meta))
        for group in stats.values():
            self._rounds = group.get("num_rounds", self._rounds)
        if seen.at != self._last:
            self._last, self._last_at = seen.at, time.monotonic()
        return JobView(
            self.job_id,
            str(meta.get(JobMetaKey.JOB_NAME.value, "")),
            status,
            str(stats.get("ServerRunner", {}).get("workflow", "")),
            self._rounds,
            seen,
            text.startswith(_CUT),
            connected,
            time.monotonic() - self._last_at,
            tuple(hidden),
        )

    def _meta(self) -> dict[str, Any]:
        try:
            return self.session.get_job_meta(self.job_id)
        except JobNotFound:
            remedy = "`list_jobs` in NVFlare's console names the jobs."
            raise PFedSAMError(ErrorCode.DEPLOYMENT, f"the server has no job {self.job_id}.", remedy) from None
        except AuthorizationError:
            message = f"not authorised: the server's policy does not let this administrator see job {self.job_id}."
            remedy = "Ask the project administrator for the right `view` (local/authorization.json of the server)."
            raise PFedSAMError(ErrorCode.DEPLOYMENT, message, remedy) from None
        except Exception as error:
            message = f"the server does not answer: {reason_of(error)}."
            raise PFedSAMError(ErrorCode.DEPLOYMENT, message, "Is it running, and is the id a job's?") from None

    def _asked(self, what: str, ask: Callable[[], _T], otherwise: _T, hidden: list[str]) -> _T:
        """An answer of the server, or what takes its place."""
        try:
            return ask()
        except AuthorizationError:
            hidden.append(what)
        except Exception:  # NVFlare's API raises many kinds: the job has just ended, a connection was cut
            pass
        return otherwise

    def _stats(self) -> dict[str, dict[str, Any]]:
        answer = self.session.show_stats(self.job_id, "server")
        stats = answer.get("server") if isinstance(answer, dict) else None
        return {name: group for name, group in (stats or {}).items() if isinstance(group, dict)}

    def _log(self) -> str:
        return str(self.session.get_job_logs(self.job_id, SERVER_SITE_NAME)["logs"].get(SERVER_SITE_NAME, ""))

    def _connected(self) -> frozenset[str] | None:
        return frozenset(client.name for client in self.session.get_connected_client_list())


def _names(meta: dict[str, Any]) -> list[str]:
    """The sites that the job was handed to."""
    listed = meta.get(JobMetaKey.JOB_CLIENTS.value) or ()
    return [str(one.get("name")) for one in listed if isinstance(one, dict)]
