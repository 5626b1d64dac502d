"""What is left of processes that should have ended. One that waits for somebody to ask for its exit code has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def left_of(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after so many seconds."""
    until = time.monotonic() + seconds
    while (left := [one for one in processes if not gone(one)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left
