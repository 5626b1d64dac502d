"""Fetch published weights: with progress, resumed where it stopped, and checked before it counts."""

from __future__ import annotations

import ipaddress
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.weights import Checkpoint, check_file, weights_folder

#: Seconds to connect, and between two pieces of data.
TIMEOUT = (10, 60)
TRIES = 4
#: Bytes; of a connection that is cut, less than one such piece is lost.
CHUNK = 1 << 16


def download(
    checkpoint: Checkpoint,
    folder: Path | None = None,
    *,
    url: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    pause: float = 1.0,
) -> Path:
    """Download a checkpoint, or what is left of it, and check it. A file that is there and right is not fetched again.

    Args:
        checkpoint: what to fetch.
        folder: where to put it; by default `weights_folder()`.
        url: of a mirror. Only https is used; plain http to this machine only.
        progress: called with bytes done and in all.
        pause: seconds before the second try; it doubles with each.

    Returns:
        the file. While it is incomplete it is called `<file>.part`.

    Raises:
        PFedSAMError: E10 naming url and file: nothing there, cut off, wrong size or checksum, no room on the disk.
    """
    source = url or checkpoint.url
    if source is None:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"{checkpoint.filename} ships in a package.", f"See {checkpoint.page}."
        )
    folder = folder or weights_folder()
    path, part = folder / checkpoint.filename, folder / f"{checkpoint.filename}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{checkpoint.filename}.lock"):
            if path.exists():
                check_file(path, checkpoint.checksum)
                return path
            _fetch(source, part, checkpoint, progress, pause)
            try:
                check_file(part, checkpoint.checksum)
            except PFedSAMError:
                part.unlink()
                raise
            part.chmod(0o644)  # they are public, and the folder may be of several users
            os.replace(part, path)
    except OSError as error:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"{path} could not be written ({error}).", _by_hand(source, path)
        ) from None
    return path


def _fetch(
    source: str, part: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None, pause: float
) -> None:
    """Fill the part; each try goes on where the last one stopped."""
    problem = "nothing was received"
    for attempt in range(TRIES):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            total = _stream(source, part, checkpoint, progress)
        except requests.RequestException as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if part.stat().st_size == total:
            return
        problem = f"the connection ended after {part.stat().st_size} of {total} bytes"
        if part.stat().st_size > total:
            part.unlink()
    path = part.with_suffix("")
    raise PFedSAMError(
        ErrorCode.WRONG_CHECKPOINT,
        f"{source} could not be fetched: {problem}. What there is was kept.",
        _by_hand(source, path),
    )


def _stream(source: str, part: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None) -> int:
    """One request; returns the size of the whole file in bytes."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    with _get(source, headers) as response:
        if response.status_code == 416:  # the part is no beginning of this file, or all of it
            if checkpoint.bytes == done:
                return done
            part.unlink()
            raise requests.ConnectionError("the server has no such rest; starting anew")
        if response.status_code not in (200, 206):
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT,
                f"{source} answers {response.status_code} {response.reason}.",
                _by_hand(source, part),
            )
        if response.status_code == 200:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else checkpoint.bytes
        if total is None or checkpoint.bytes not in (None, total):
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT,
                f"{source} has {total} bytes, expected {checkpoint.bytes}.",
                "Look for the published file.",
            )
        if shutil.disk_usage(part.parent).free < total - done:
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT,
                f"{part.parent} has no room for {total - done} bytes.",
                "Choose another folder.",
            )
        with part.open("ab" if done else "wb") as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    return total


def _get(source: str, headers: dict[str, str], redirects: int = 5) -> requests.Response:
    """A GET whose every step is allowed by `_check_url`."""
    for _ in range(redirects + 1):
        _check_url(source)
        response = requests.get(source, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False)
        if not response.is_redirect:
            return response
        source = requests.compat.urljoin(source, response.headers["Location"])
        response.close()
    raise requests.TooManyRedirects(f"more than {redirects} redirects")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_this_machine(parts.hostname or "")):
        return
    raise PFedSAMError(
        ErrorCode.WRONG_CHECKPOINT, f"{url} is not an https address.", "Weights come over https, or as a file by hand."
    )


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _by_hand(source: str, path: Path) -> str:
    place = path.with_name(path.name.removesuffix(".part"))
    return f"Try again, or fetch {source} on another machine and put it at {place}."
