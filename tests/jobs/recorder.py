"""What a curious server would keep, and how to look for personal values in it.

A copy of this file goes into `app/custom` of a test job: `Recorder` is a component of the server, `StateWatcher` of a
site. The rest is used by the tests afterwards.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FedEventHeader, FLContextKey
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.fuel.f3.sfm.conn_manager import SfmFrameReceiver
from nvflare.fuel.utils import fobs
from safetensors import safe_open

#: Environment variables that name the folders of a recording.
RECORD, STATES = "TEST_RECORD", "TEST_STATES"
FRAMES, ITEMS = "frames.bin", "items.pickle"
#: Bytes that count as a finding.
WINDOW = 16
_STATE_ROOT = "PFEDSAM_STATE_ROOT"
_LENGTH = struct.Struct("<I")
_lock = threading.Lock()


@dataclass
class Item:
    """One thing that reached the server: a task's result before the guard, or a federation event.

    Attributes:
        kind: `result`, or the event's name.
        site: who sent it.
        task: name of the task of a result.
        number: counts the site's results of that task.
        size: bytes of its serialised form.
        leaves: every value in it, with where it is.
    """

    kind: str
    site: str
    task: str = ""
    number: int = 0
    size: int = 0
    leaves: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def return_code(self) -> str:
        return dict(self.leaves).get(f"/{ReservedHeaderKey.HEADERS}/{ReservedHeaderKey.RC}", "OK")

    def blob(self) -> bytes:
        """Everything in it as bytes: arrays raw, numbers of lists as doubles, texts in UTF-8."""
        parts: list[bytes] = []
        for is_number, group in itertools.groupby(self.leaves, lambda leaf: isinstance(leaf[1], float)):
            values = [value for _, value in group]
            if is_number:
                parts.append(np.asarray(values, dtype=np.float64).tobytes())
                continue
            for value in values:
                if isinstance(value, np.ndarray):
                    parts.append(np.ascontiguousarray(value).tobytes())
                else:
                    parts.append(value if isinstance(value, bytes) else str(value).encode())
        return b"\0".join(parts + [where.encode() for where, _ in self.leaves])

    def texts(self) -> list[str]:
        """Names and strings in it."""
        return [where for where, _ in self.leaves] + [value for _, value in self.leaves if isinstance(value, str)]


class Recorder(FLComponent):
    """Writes down every frame, every result before the guard, and every federation event of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ[RECORD])
        self.counts: dict[tuple[str, str], int] = {}
        record_frames(self.folder / FRAMES)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        peer = fl_ctx.get_peer_context()
        site = str(peer.get_identity_name()) if peer else ""
        if event_type == EventType.BEFORE_TASK_RESULT_FILTER:
            task, result = fl_ctx.get_prop(FLContextKey.TASK_NAME), fl_ctx.get_prop(FLContextKey.TASK_RESULT)
            number = self.counts[(site, task)] = self.counts.get((site, task), -1) + 1
            self._keep(Item("result", site, task, number, len(fobs.dumps(result)), list(leaves(result))))
        elif event_type.startswith("fed."):
            # its headers hold all that the site made public in its context
            data = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
            origin = data.get_header(FedEventHeader.ORIGIN, "") if isinstance(data, Shareable) else ""
            self._keep(Item(event_type, origin, leaves=list(leaves(data))))

    def _keep(self, item: Item) -> None:
        # plain values only, so that the tests can read it without this module's name
        with _lock, (self.folder / ITEMS).open("ab") as file:
            pickle.dump(vars(item), file)


class StateWatcher(FLComponent):
    """Copies a site's personal state after every task, so that the tests know every value it ever had."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == EventType.AFTER_TASK_EXECUTION:
            site = fl_ctx.get_identity_name()
            target = Path(os.environ[STATES]) / site
            target.mkdir(parents=True, exist_ok=True)
            for path in Path(os.environ[_STATE_ROOT]).glob(f"*/{site}/*/state.safetensors"):
                shutil.copyfile(path, target / f"{len(list(target.iterdir())):03d}.safetensors")


def record_frames(path: Path) -> None:
    """Keep every frame that arrives in this process: the lowest place at which all messages pass.

    The simulator's server shares its process with the sites' parents, so this is more than the server alone sees.
    """
    original = SfmFrameReceiver.process_frame

    def process_frame(self: SfmFrameReceiver, frame: Any) -> None:
        data = bytes(frame)
        with _lock, path.open("ab") as file:
            file.write(_LENGTH.pack(len(data)) + data)
        original(self, frame)

    SfmFrameReceiver.process_frame = process_frame


def leaves(value: Any, where: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every array, number, text and byte string in a value, however deep, with its place.

    Other objects give their class only: the server hangs its own on a result, and what a site sent is in the frames.
    """
    if value is None or isinstance(value, (str, bytes, int, float)):
        yield where, value
    elif isinstance(value, (np.ndarray, np.generic)):
        yield where, np.asarray(value)
    elif id(value) in seen:
        return
    elif isinstance(value, dict):
        for key, one in dict.items(value):
            yield from leaves(one, f"{where}/{key}", seen | {id(value)})
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, one in enumerate(value):
            yield from leaves(one, f"{where}/{number}", seen | {id(value)})
    else:
        yield where, type(value).__name__


def read_items(folder: Path) -> list[Item]:
    """What `Recorder` kept, in the order in which it came."""
    items = []
    with (folder / ITEMS).open("rb") as file:
        while file.peek(1):
            items.append(Item(**pickle.load(file)))
    return items


def read_frames(folder: Path) -> list[bytes]:
    """The frames that `Recorder` kept."""
    data, frames, position = (folder / FRAMES).read_bytes(), [], 0
    while position < len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        frames.append(data[position + _LENGTH.size : position + _LENGTH.size + length])
        position += _LENGTH.size + length
    return frames


def personal_arrays(state_file: Path) -> dict[str, np.ndarray]:
    """Personal tensors and optimiser moments of a state file."""
    with safe_open(state_file, framework="np") as file:
        names = [name for name in file.keys() if name.partition("/")[0] in ("personal", "moments")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


class Needles:
    """Windows of 16 bytes to look for.

    Windows with little in them (zeros, constants) would be found anywhere and are left out.
    """

    def __init__(self, windows: Iterable[bytes]) -> None:
        self.windows = frozenset(windows)
        self._keys = np.unique(np.frombuffer(b"".join(one[:8] for one in self.windows), dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.windows)

    def __sub__(self, others: Iterable[Needles]) -> Needles:
        return Needles(self.windows.difference(*(other.windows for other in others)))

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray], forms: bool = True) -> Needles:
        """Windows of the arrays as they are, and in other forms if asked for.

        The forms: halves, doubles, hexadecimal digits, and a list of numbers as MessagePack writes it.
        """
        found: set[bytes] = set()
        for array in arrays:
            flat = np.ascontiguousarray(array).ravel()
            if flat.dtype.kind != "f":
                continue
            found |= _windows(flat.tobytes())
            if forms:
                found |= _windows(flat.tobytes().hex().encode())
                found |= _windows(flat.astype(np.float16).tobytes())
                found |= _windows(flat.astype(np.float64).tobytes())
                found |= _windows(_packed(flat))
        return cls(found)

    def in_(self, haystack: bytes) -> set[bytes]:
        """Those that occur in the haystack, at any offset."""
        found: set[bytes] = set()
        if not self.windows or len(haystack) < WINDOW:
            return found
        for shift in range(8):
            words = np.frombuffer(haystack, np.uint64, (len(haystack) - shift) // 8, shift)
            places = np.searchsorted(self._keys, words).clip(max=len(self._keys) - 1)
            for index in np.flatnonzero(self._keys[places] == words):
                start = shift + 8 * int(index)
                window = haystack[start : start + WINDOW]
                if window in self.windows:
                    found.add(window)
        return found


def _packed(flat: np.ndarray) -> bytes:
    """The first 16 of each 18 bytes that MessagePack takes for two floats of a list."""
    packed = np.empty((flat.size, 9), dtype=np.uint8)
    packed[:, 0] = 0xCB
    packed[:, 1:] = flat.astype(">f8").view(np.uint8).reshape(-1, 8)
    return packed[: flat.size // 2 * 2].reshape(-1, 18)[:, :WINDOW].tobytes()


def _windows(data: bytes) -> set[bytes]:
    rows = np.frombuffer(data[: len(data) // WINDOW * WINDOW], dtype=np.uint8).reshape(-1, WINDOW)
    rich = _different(rows) >= 8
    rich &= _different(rows[:, :8]) >= 4
    return {row.tobytes() for row in rows[rich]}


def _different(rows: np.ndarray) -> np.ndarray:
    """How many different bytes each row has."""
    return (np.diff(np.sort(rows, axis=1), axis=1) != 0).sum(axis=1) + 1


def texts_in(texts: Iterable[str], haystack: bytes) -> list[str]:
    """Those of the texts that occur in the haystack, in UTF-8 or UTF-16."""
    return [one for one in texts if one.encode() in haystack or one.encode("utf-16-le") in haystack]


def words_in(word: str, texts: Iterable[str]) -> list[str]:
    """Those of the texts that hold the word."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")
    return [text for text in texts if pattern.search(text)]


def server_files(workspace: Path) -> dict[str, bytes]:
    """Every file below the server's folder, by its path there."""
    folder = workspace / "server"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
