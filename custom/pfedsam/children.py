"""Processes that end with the one that started them, however that one ends.

    python -m pfedsam.children <pid> <command> ...

runs a command for the process with that number, its parent, and ends it with all that it has started, in whatever
session, when the parent is gone or sends SIGTERM. NVFlare's simulator starts a session for each site: no signal to one
process group reaches them all, and a parent that is killed cannot send any.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>
_LOOK_SECONDS = 0.2
#: For what goes on for a moment after the command has ended, and for what does not die at once.
_GRACE_SECONDS = 10.0
#: What a terminal sends to all processes in it. The parent alone acts on it, and ends its children in order.
_OF_A_TERMINAL = frozenset({signal.SIGINT, signal.SIGHUP})


def supervised(command: Sequence[str]) -> list[str]:
    """The command line that runs a command as a child of this process and ends it with this process."""
    return [sys.executable, "-m", "pfedsam.children", str(os.getpid()), *command]


def end(process: subprocess.Popen[str]) -> None:
    """End a supervised command with all that it has started, and wait until nothing of it is left."""
    process.terminate()
    try:
        process.wait(3 * _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent() -> None:
    """End this process of `multiprocessing` at once when its parent is gone, whatever it computes meanwhile."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # a pipe that the system closes with the parent: at once, and also if it was gone before
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def begin(work: str, *arguments: Any) -> None:
    """Target of a process of `multiprocessing` that ends with its parent, from before it imports anything large.

    Args:
        work: `module:function`; a name, because the function itself would be imported first.
        arguments: of the function; for the same reason plain values, or what only `multiprocessing` can hand over.
    """
    end_with_parent()
    pkgutil.resolve_name(work)(*arguments)


@contextlib.contextmanager
def terminal_signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGHUP back: they come after the block, and never to a process that is started in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_A_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def supervise(parent: int, command: Sequence[str]) -> int:
    """Run a command until it ends, its parent is gone, or SIGTERM comes; then nothing of it is left.

    Args:
        parent: number of the process for which it runs.
        command: program and arguments.

    Returns:
        The command's exit code, or 128 and the number of the signal that ended it; of SIGTERM if that came from here.
    """
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a process whose parent ends becomes a child of this one
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    process = subprocess.Popen(command)
    try:
        while (code := process.poll()) is None and os.getppid() == parent and not asked.is_set():
            time.sleep(_LOOK_SECONDS)
        if code is not None:
            _wait_for_the_rest(asked)
    finally:
        _end_all_below()
    return 128 + signal.SIGTERM if code is None else code if code >= 0 else 128 - code


def _wait_for_the_rest(asked: threading.Event) -> None:
    until = time.monotonic() + _GRACE_SECONDS
    while _below() and time.monotonic() < until and not asked.is_set():
        time.sleep(_LOOK_SECONDS)


def _end_all_below() -> None:
    """Looked for again until there is none: one may have been started in the meantime."""
    until = time.monotonic() + _GRACE_SECONDS
    while (running := _below()) and time.monotonic() < until:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=1)


def _below() -> list[psutil.Process]:
    """What runs below this process; not what has ended and waits to be asked for its exit code."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere what is asked for is done in another way or later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
