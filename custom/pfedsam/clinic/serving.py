"""MONAI Label's server as a child of this process, and the loop that answers what it asks."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pfedsam.children import end, supervised, terminal_signals_held
from pfedsam.clinic.desk import Desk
from pfedsam.errors import ErrorCode, PFedSAMError

#: Bytes of random numbers in the address.
_TOKEN = 24
_START = "import sys; sys.path.insert(0, sys.argv[1]); from front.serve import main; main()"
_HAS = "import importlib.util, sys; sys.exit(importlib.util.find_spec('monailabel') is None)"
_REMEDY = (
    "Install MONAI Label in an environment of its own and give its Python with --monailabel (custom/clinicians.md)."
)
_SCRATCH = "pfedsam-label-"
#: Characters of the server's last words that are shown.
_WORDS = 2000


def find_monailabel(python: Path | None) -> str:
    """The Python interpreter that has MONAI Label: the given one, else this one.

    Raises:
        PFedSAMError: E31 if it is none, or has no MONAI Label.
    """
    # as it was given: a link into another installation is what makes a virtual environment
    chosen = sys.executable if python is None else os.path.abspath(python)
    try:
        done = subprocess.run([chosen, "-c", _HAS], capture_output=True, check=False, env=_environment())
    except OSError as error:
        message = f"{chosen} is no Python interpreter: {error.strerror}."
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, message, _REMEDY) from None
    if done.returncode:
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, f"{chosen} has no package monailabel.", _REMEDY)
    return chosen


class LabelServer:
    """MONAI Label's server in front of a desk. A context manager: at its end nothing of it is left.

    Args:
        desk: makes the answers, in the thread that calls `serve`.
        python: interpreter that has MONAI Label.
        port: 0 for a free one.

    Raises:
        PFedSAMError: from `serve`: E22 if the port is taken or the server does not start.
    """

    def __init__(self, desk: Desk, python: str, port: int = 0) -> None:
        self.desk, self.python, self.port = desk, python, port
        self.token = secrets.token_urlsafe(_TOKEN)
        self._log = desk.scratch / "server.log"

    def __enter__(self) -> LabelServer:
        ours, theirs = socket.socketpair()
        code = [self.python, "-c", _START, str(Path(__file__).parent)]
        with theirs, self._log.open("wb") as log, terminal_signals_held():
            self._process: Any = subprocess.Popen(
                supervised(code), stdin=theirs.fileno(), stdout=log, stderr=subprocess.STDOUT, env=_environment()
            )
        self._channel = ours
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        end(self._process)

    def serve(self, ready: Callable[[str], None]) -> None:
        """Answer until the server ends.

        Args:
            ready: is called with the address once the server answers.
        """
        words = self._channel.makefile("w", encoding="utf-8")
        told = {"token": self.token, "port": self.port, "scratch": str(self.desk.scratch), "site": str(self.desk.site)}
        try:
            _say(words, told)
            for line in self._channel.makefile("r", encoding="utf-8"):
                _say(words, self._answer(json.loads(line), ready))
        except (BrokenPipeError, ConnectionResetError):
            pass
        raise self._failed("MONAI Label's server has ended")

    def _answer(self, question: dict[str, Any], ready: Callable[[str], None]) -> dict[str, Any]:
        if question.get("do") == "failed":
            raise PFedSAMError(ErrorCode.DEPLOYMENT, f"{question['why']}.", "Take another --port; 0 takes a free one.")
        if question.get("do") == "ready":
            ready(f"http://127.0.0.1:{question['port']}/{self.token}")
            return {"answer": None}
        return self.desk.answer(question)

    def _failed(self, what: str) -> PFedSAMError:
        last = self._log.read_text(errors="replace")[-_WORDS:].strip()
        return PFedSAMError(
            ErrorCode.DEPLOYMENT,
            f"{what}. Its last words: {last or 'none'}",
            "Install it as custom/clinicians.md says.",
        )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that only this user may enter, for what is received and made; deleted at the end.

    What a command that was killed has left is deleted, too, at the next start.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        number = left.name.removeprefix(_SCRATCH).partition("-")[0]
        with suppress(OSError):
            if number.isdigit() and not psutil.pid_exists(int(number)) and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def _say(words: Any, what: dict[str, Any]) -> None:
    words.write(json.dumps(what) + "\n")
    words.flush()


def _environment() -> dict[str, str]:
    """Without what would lead another environment's Python to this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
