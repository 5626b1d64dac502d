"""What a long command tells of itself while it runs: `<run>/progress.json`, written anew with each event.

`pfedsam watch`, in another terminal, and the page of `--live` read it, beside the records of the run itself. It names
sites, never cases: an error is told by its code, its sentence stays in the terminal and in the logs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_atomically

PROGRESS_FILE = "progress.json"
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
#: Of two moments at which one process is said to have begun.
_SAME_SECONDS = 1.0


@dataclass
class Pace:
    """How fast steps follow each other, from the first that was seen: what a command does before it is no step.

    Attributes:
        first, first_at: steps done, and the time (seconds since 1970), when the first was seen.
        done, at: the same of the last.
    """

    first: float | None = None
    first_at: float = 0.0
    done: float = 0.0
    at: float = 0.0

    def step(self, done: float, now: float) -> None:
        """So many steps are done at this time."""
        if self.first is None:
            self.first, self.first_at = done, now
        elif done == self.done:
            return
        self.done, self.at = done, now

    def left(self, total: float, now: float) -> float | None:
        """Seconds until `total` steps are done, None before two moments are known.

        A step that lasts longer than those before it counts as what it has lasted.
        """
        if self.first is None or self.at <= self.first_at:
            return None
        seconds, waited = (self.at - self.first_at) / (self.done - self.first), max(0.0, now - self.at)
        if waited > seconds:
            seconds = (now - self.first_at) / (self.done - self.first + 1)
        return max(0.0, seconds * (total - self.done) - min(waited, seconds))


@dataclass
class Progress:
    """Where a long command is.

    Attributes:
        what: `simulation` or `comparison`.
        name: of the federation or the comparison, for people.
        command: the command line that goes on with it.
        sites: names of the sites.
        rounds: of the federation, or of every federation.
        runs: of a comparison, see `pfedsam.report.live.comparison`.
        records: of a comparison: the file of its records.
        total, done: events expected and told.
        line: the last event.
        active: the last event of each run of a comparison that runs now.
        failed: code of each run of a comparison that failed.
        state: `running`, `finished`, `failed` or `stopped`.
        code: of the error that ended it.
        begun: seconds since 1970.
        ended: the same, None while it runs.
        pid, pid_begun: the process, and when it began.
        pace: of its events.
    """

    what: str
    name: str
    command: str
    sites: list[str]
    rounds: int
    runs: list[dict[str, Any]] = field(default_factory=list)
    records: str = ""
    total: int = 0
    done: int = 0
    line: str = "starting"
    active: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    state: str = RUNNING
    code: str = ""
    begun: float = field(default_factory=time.time)
    ended: float | None = None
    pid: int = field(default_factory=os.getpid)
    pid_begun: float = field(default_factory=lambda: psutil.Process().create_time())
    pace: Pace = field(default_factory=Pace)

    @property
    def runs_now(self) -> bool:
        """Whether its process is there: one that was killed cannot say that it has stopped."""
        if self.state != RUNNING:
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.pid_begun) < _SAME_SECONDS
        except psutil.Error:
            return False

    def event(self, done: int, line: str) -> None:
        """So many events are told, the last was this one."""
        self.done, self.line = done, line
        self.pace.step(done, time.time())

    def end(self, state: str, code: str = "") -> None:
        """It has ended so."""
        self.state, self.code, self.ended, self.active = state, code, time.time(), {}

    def left(self, now: float) -> float | None:
        """Seconds left at a time, None where they are not known."""
        return self.pace.left(self.total, now)


def write_progress(run: Path, progress: Progress) -> None:
    """Write the file, mode 0600.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(run / PROGRESS_FILE, json.dumps(asdict(progress)).encode())


def read_progress(run: Path) -> Progress:
    """What a command has told in a run folder; one whose process is gone has stopped.

    Raises:
        PFedSAMError: E33 if there is no such file, or something else in it.
    """
    path = run / PROGRESS_FILE
    remedy = "Give the folder of `pfedsam simulate`, `demo` or `compare`; an older run gets one when it goes on."
    if not path.is_file():
        raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"{run} holds no {PROGRESS_FILE}.", remedy)
    try:
        progress = _of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        message = f"{path} tells no progress ({type(error).__name__}: {error})."
        raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, message, remedy) from None
    if progress.state == RUNNING and not progress.runs_now:
        progress.end(STOPPED)
        progress.ended = path.stat().st_mtime
    return progress


def _of(content: Mapping[str, Any]) -> Progress:
    """Keys of a later version are left out."""
    known = {one.name for one in fields(Progress)}
    values = {key: value for key, value in content.items() if key in known}
    return Progress(**values | {"pace": Pace(**content["pace"])})
