"""Kills processes that write, at random times, and looks what the next one finds.

A child is forked, makes the start that any process would make, and writes one thing after the other, each of which it
acknowledges on a pipe. It is killed (SIGKILL) and the next one is forked. Where it was at its death is told by memory
that both share: bytes that the child sets before it enters a write and while a file is open or waits to be renamed.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

#: What a child says when it has started.
READY = 2**32 - 1
#: Seconds until a child that says nothing has hung.
PATIENCE = 300.0
#: Places in the shared memory: inside a call, inside the writing of a file, and the seconds that the last file took.
CALL, FILE, SECONDS = 0, 1, 8
#: Audit events of Python before a file or folder is made or renamed.
_MAKES = ("os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp")


class Writer(Protocol):
    """Writes numbered things with the code that is tested."""

    def start(self, acknowledged: list[int]) -> None:
        """What a process does first; raises if something that was acknowledged is not whole."""

    def write(self, number: int) -> None:
        """Write one thing; when it returns, the thing counts."""


class Deaths:
    """Kills a writer again and again.

    Args:
        writer: what is killed.
        folder: that it writes in.
        seed: of the times.

    Attributes:
        acknowledged: numbers that were acknowledged, in order.
        where: how many kills were inside a call, and inside the writing of a file.
    """

    def __init__(self, writer: Writer, folder: Path, seed: int = 0) -> None:
        self.writer, self.folder = writer, str(folder)
        self.acknowledged: list[int] = []
        self.where: Counter[str] = Counter()
        self._random = np.random.default_rng(seed)
        self._marks = mmap.mmap(-1, mmap.PAGESIZE)
        self._seconds = 0.01

    def kill(self, times: int) -> None:
        """Kill the writer so often; a last start tells whether all is whole.

        Raises:
            AssertionError: with the traceback of a child.
        """
        for number in range(times):
            # every second one as soon as a file is being written, the others at any time
            self._one(aimed=bool(number % 2))
        pid, pipe = self._fork(only_start=True)
        self._read(pipe, until_ready=True)
        os.waitpid(pid, 0)
        os.close(pipe)

    def _one(self, aimed: bool) -> None:
        self._marks[CALL] = self._marks[FILE] = 0
        pid, pipe = self._fork()
        try:
            self._read(pipe, until_ready=True)
            begin = time.monotonic()
            wait = float(self._random.uniform(0, 1.5 * self._seconds))
            if aimed:
                self._until(lambda: self._marks[FILE])
                (seconds,) = struct.unpack_from("<d", self._marks, SECONDS)
                wait = float(self._random.uniform(0, seconds))
            until = time.monotonic() + wait
            self._until(lambda: time.monotonic() >= until)
        finally:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        passed = time.monotonic() - begin
        done = self._read(pipe)
        os.close(pipe)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        self.acknowledged += done
        if len(done) > 1:
            self._seconds = 0.5 * self._seconds + 0.5 * passed / len(done)
        elif passed > self._seconds:
            self._seconds = passed
        self.where["call"] += bool(self._marks[CALL])
        self.where["file"] += bool(self._marks[FILE])

    @staticmethod
    def _until(reached: Any) -> None:
        late = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < late, "the child has hung"

    def _fork(self, only_start: bool = False) -> tuple[int, int]:
        receive, send = os.pipe()
        pid = os.fork()
        if pid:
            os.close(send)
            return pid, receive
        try:
            os.close(receive)
            self._child(send, only_start)
        except BaseException:
            os.write(send, b"\0\0\0\0" + traceback.format_exc().encode())
        finally:
            os._exit(0)

    def _child(self, send: int, only_start: bool) -> None:
        self.writer.start(self.acknowledged)
        os.write(send, struct.pack("<I", READY))
        if only_start:
            return
        sys.addaudithook(self._audit)
        number = self.acknowledged[-1] if self.acknowledged else 0
        while True:
            number += 1
            self._marks[CALL] = 1
            self.writer.write(number)
            if self._marks[FILE]:
                struct.pack_into("<d", self._marks, SECONDS, time.monotonic() - self._begin)
            self._marks[CALL] = self._marks[FILE] = 0
            os.write(send, struct.pack("<I", number))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._marks[CALL] or not (event in _MAKES or event == "open"):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(self.folder) and not self._marks[FILE]:
            self._begin = time.monotonic()
            self._marks[FILE] = 1

    def _read(self, pipe: int, until_ready: bool = False) -> list[int]:
        """Numbers from the pipe: one that says that the child is ready, or all that there are."""
        data = b""
        while not (until_ready and len(data) == 4):
            assert select.select([pipe], [], [], PATIENCE)[0], "the child has hung"
            more = os.read(pipe, 4 if until_ready else 1 << 16)
            if not more:
                break
            if data[:4] == b"\0\0\0\0" or more[:4] == b"\0\0\0\0":
                until_ready = False
            data += more
        place = data.find(b"\0\0\0\0Traceback")
        assert place < 0, data[place + 4 :].decode()
        numbers = [one for (one,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])]
        assert not until_ready or numbers == [READY], "the child ended before it had started"
        return [one for one in numbers if one != READY]
