"""A service file of the guide as systemd would run it, as far as the tests need it: systemd itself needs a machine.

What is followed: `Environment`, `ExecStartPre` (a failure of one with `-` is ignored), `ExecStart`, and
`Restart=on-failure`, by which a service that ends with another code than 0, or by a signal that nobody sent it to stop,
is started again. All of a service's processes end together: systemd knows them by their control group, this by a word
in their environment.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil

FILES = Path(__file__).resolve().parents[2] / "poc_workspace"
_MARK = "PFEDSAM_TEST_SERVICE"


def settings(unit: Path, places: dict[str, str] | None = None) -> dict[str, list[str]]:
    """The settings of a service file, each with its values in order, after these words were replaced by others."""
    text = unit.read_text()
    for place, own in (places or {}).items():
        text = text.replace(place, own)
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


class Service:
    """A running service file.

    Args:
        unit: the file, with the paths of the guide.
        kit: startup kit in the place of the guide's.
        home: in the place of `/var/lib/pfedsam`.
        more: further environment.
    """

    def __init__(self, unit: Path, kit: Path, home: Path, more: dict[str, str] | None = None) -> None:
        places = {"/opt/pfedsam/venv/bin": str(Path(sys.executable).parent), "/opt/pfedsam/kit": str(kit)}
        self.settings = settings(unit, {**places, "/var/lib/pfedsam": str(home)})
        assert self.settings["Restart"] == ["on-failure"], "this follows no other rule"
        self._mark = uuid.uuid4().hex
        given = dict(one.split("=", 1) for one in self.settings["Environment"])
        self.environment = {**given, **(more or {}), _MARK: self._mark}
        self.log = home / f"{unit.stem}.log"
        home.mkdir(parents=True, exist_ok=True)
        #: Exit codes of its runs; one that still runs has none.
        self.codes: list[int] = []
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether it runs, or will be started again."""
        return self._thread.is_alive()

    def kill(self) -> None:
        """End all its processes at once, as a power cut does; systemd starts it again."""
        _end(self._mark, signal.SIGKILL)

    def stop(self) -> None:
        """As `systemctl stop`."""
        self._stopped = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            _end(self._mark, number)
        self._thread.join(30)
        assert not self.active

    def _run(self) -> None:
        while not self._stopped:
            for command in self.settings.get("ExecStartPre", ()):
                code = self._start(command.removeprefix("-")).wait()
                if code and not command.startswith("-"):
                    self.codes.append(code)
                    return
            self.codes.append(self._start(self.settings["ExecStart"][0]).wait())
            # what is left of it ends with it
            _end(self._mark, signal.SIGKILL)
            if not self.codes[-1]:
                return
            time.sleep(1)  # systemd waits as long as RestartSec says

    def _start(self, command: str) -> subprocess.Popen[bytes]:
        words = shlex.split(command.replace("$$", "$"))
        with self.log.open("ab") as log:
            how = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            return subprocess.Popen(words, env=self.environment, start_new_session=True, **how)  # type: ignore[call-overload, no-any-return]


def _end(mark: str, number: int) -> None:
    """Send a signal to all processes of a service, and wait until they are gone."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark:
                process.send_signal(number)
                members.append(process)
    psutil.wait_procs(members, timeout=10)
