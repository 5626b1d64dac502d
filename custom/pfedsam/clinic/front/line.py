"""The line to the process that holds the model: one question, one answer, each a line of JSON."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any


class Refused(Exception):
    """A sentence for the person at the screen; it stays on this machine."""


class Line:
    """Asks one question at a time.

    Args:
        channel: a connected socket; its first line is what the other side tells at the start.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._lock = threading.Lock()
        self._lines, self._words = channel.makefile("r", encoding="utf-8"), channel.makefile("w", encoding="utf-8")
        self.told: dict[str, Any] = json.loads(self._lines.readline())

    def ask(self, do: str, **what: Any) -> Any:
        """The answer to a question.

        Raises:
            Refused: with the sentence of the other side, or if it is gone.
        """
        with self._lock:
            self._words.write(json.dumps({"do": do, **what}) + "\n")
            self._words.flush()
            answered = self._lines.readline()
        if not answered:
            raise Refused("pfedsam has ended. Start `pfedsam label-server` again.")
        answer = json.loads(answered)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["answer"]
