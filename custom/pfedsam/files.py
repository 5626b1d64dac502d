"""Files that are complete or not there, JSON lines that a crash cannot spoil, and tensors without pickles."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedsam.errors import ErrorCode, PFedSAMError, shown

if TYPE_CHECKING:
    from torch import Tensor


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object in a file.

    Args:
        path: the file.
        remedy: what to do if it holds none.

    Raises:
        PFedSAMError: E29 if the file is missing, not readable, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"{path} is not readable: {error}.", remedy) from None
    if not isinstance(content, dict):
        message = f"{path} is {shown(content)}, expected keys with values."
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, message, remedy)
    return content


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file's content, in hexadecimal; the file may be larger than the memory."""
    digest = hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(path: Path | None) -> str:
    """Hash of a file's content, or of that of a folder of DICOM slices; "" for none.

    A file is read once in a process, as long as its size and time stay the same.
    """
    if path is None:
        return ""
    if path.is_dir():
        return hash_of([content_hash(file) for file in sorted(path.iterdir()) if file.is_file()])
    status = path.stat()
    return _content_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _content_hash(path: Path, size: int, time_ns: int) -> str:
    return file_digest(path)


def read_into(handle: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a place in an open file, whatever else reads the file: its position is not used.

    Raises:
        OSError: if the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(f"a file ends at byte {offset + done}, {len(buffer) - done} more were expected")
        done += count


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file of mode 0600: to a temporary file beside it, flushed to disk, then renamed.

    Raises:
        OSError: if it cannot be written; a file that was there before is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def when_whole(out: str | Path) -> Iterator[Path]:
    """A path for a library to write a file or a folder to: it takes the place of `out` if nothing was raised.

    It has the name of `out`, in a hidden folder beside it that goes in any case. A folder that was there before is
    removed when the new one is in its place; a file is replaced in one step.

    Raises:
        OSError: if it cannot be written; what was there before is intact then.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        path = Path(scratch) / out.name
        yield path
        if path.is_dir() and out.is_dir():
            os.replace(out, Path(scratch) / "before")
        os.replace(path, out)


def write_like(path: str | Path, data: bytes, like: Path) -> None:
    """Write a file, atomically, with the mode of the file `like`, or as the owner's only in the folder `like`.

    Written by root it belongs to the owner of `like`: a service that reads `like` reads it, too.

    Raises:
        OSError: as `write_atomically`.
    """
    status = like.stat()
    write_atomically(path, data)
    if like.is_file():
        Path(path).chmod(stat.S_IMODE(status.st_mode))
    if os.geteuid() == 0:
        os.chown(path, status.st_uid, status.st_gid)


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, flushed to disk. A line that a crash has cut off does not swallow it.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; none if there is no file, and without lines that were cut off."""
    path, records = Path(path), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of a safetensors file. Nothing in the file is executed.

    Raises:
        ValueError: if the file cannot be read, with the reason.
    """
    # with torch behind it, and most of what writes files needs none
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
