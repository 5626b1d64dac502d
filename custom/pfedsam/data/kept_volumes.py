"""Prepared volumes that a site keeps from one job to the next, in a folder that the site itself has named.

They are pictures of patients, as the originals are. So a file belongs to its owner alone, the folder is the site's own
choice (`prepared_root`). What was made of a file goes when a job finds that the file is gone, and is made anew when its
content is another one.

<folder>/<key>/<volume>.slices   the voxels, see `pfedsam.data.volume_file`
<folder>/<key>/<volume>.json     where they lie in it, and which files they were made of
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pfedsam.data.volume_file import StoredVolume, append
from pfedsam.files import content_hash, hash_of, when_whole, write_atomically

logger = logging.getLogger(__name__)

#: Counts up when the files change.
FORM = 1
#: Volumes of settings that no job has used for so long are removed.
DAYS = 90
#: Seconds after which a file that is still half written belongs to a job that was killed.
DAY = 86400
_SLICES, _INDEX = ".slices", ".json"


class KeptVolumes:
    """The volumes of one key in a folder.

    Args:
        folder: of the site; made if need be, mode 0700.
        key: of all that decides how a volume is prepared.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder) / key
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(self.folder)
        remove_outdated(self.folder.parent)

    def find(self, item: Mapping[str, Any]) -> StoredVolume | None:
        """The volume that was made of an item's files as they are now, None if it is not kept."""
        name = _name(item)
        record = _record(self.folder / f"{name}{_INDEX}")
        with suppress(OSError):
            size = (self.folder / f"{name}{_SLICES}").stat().st_size
            if record is not None and record["bytes"] == size and record["content"] == _content(item):
                return self._volume(name, record["index"])
        return None

    def save(self, item: Mapping[str, Any], volume: Mapping[str, Any]) -> StoredVolume:
        """Keep a volume.

        Raises:
            TypeError: for a value that cannot be written, see `volume_file.append`.
            OSError: if it cannot be written.
        """
        name = _name(item)
        with when_whole(self.folder / f"{name}{_SLICES}") as path, path.open("wb") as file:
            path.chmod(0o600)
            index = append(file, volume)
            size = file.tell()
        record = {"form": FORM, "made_of": _files(item), "content": _content(item), "bytes": size, "index": index}
        write_atomically(self.folder / f"{name}{_INDEX}", json.dumps(record).encode())
        return self._volume(name, index)

    def _volume(self, name: str, index: Mapping[str, Any]) -> StoredVolume:
        return StoredVolume(index, lambda: _descriptor(self.folder / f"{name}{_SLICES}"))


def remove_outdated(folder: Path) -> None:
    """Remove what was made of files that are gone, what a killed job has left, and keys not used for `DAYS`."""
    for key in (path for path in folder.iterdir() if path.is_dir()):
        used = key.stat()
        if time.time() - used.st_mtime > DAYS * DAY:
            shutil.rmtree(key, ignore_errors=True)
            continue
        for path in key.glob(".*"):
            if time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        gone = [path for path in key.glob(f"*{_INDEX}") if _is_gone(_record(path))]
        for path in gone:
            path.unlink(missing_ok=True)
            path.with_suffix(_SLICES).unlink(missing_ok=True)
        if gone:
            logger.info("%d prepared volume(s) of files that are gone are removed", len(gone))
            os.utime(key, (used.st_atime, used.st_mtime))


def _is_gone(record: Mapping[str, Any] | None) -> bool:
    return record is None or not all(Path(source).exists() for source in record["made_of"].values())


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
        return record if record["form"] == FORM and isinstance(record["index"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(item: Mapping[str, Any]) -> dict[str, str]:
    """The image and label files of an item."""
    return {key: str(Path(item[key]).absolute()) for key in ("image", "label") if key in item}


def _content(item: Mapping[str, Any]) -> list[str]:
    return [content_hash(Path(path)) for path in _files(item).values()]


def _name(item: Mapping[str, Any]) -> str:
    return hash_of(_files(item))[:32]
