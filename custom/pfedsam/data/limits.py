"""A limit on what a small file may claim to hold, looked at before anything is unpacked."""

from __future__ import annotations

import os
from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError

#: Environment variable of this machine: gigabytes that a strongly compressed file may unpack to.
LIMIT_VARIABLE = "PFEDSAM_IMAGE_LIMIT_GB"
DEFAULT_LIMIT_GB = 0.5
#: A file that unpacks to at most so many times its size holds what it claims: images rarely pack 10 times smaller.
HONEST_RATIO = 100


def limit_bytes() -> int:
    """The limit in bytes.

    Raises:
        PFedSAMError: E01 if the environment variable is no positive number.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{LIMIT_VARIABLE} is '{text}', no positive number.", "Give gigabytes, as 0.5."
        )
    return int(limit * 1e9)


def check_claim(path: Path, claimed: int) -> None:
    """Refuse a file whose header claims far more than it can hold.

    Args:
        path: the file.
        claimed: bytes of its voxels or pixels by its header.

    Raises:
        PFedSAMError: E05 if that is more than the limit and more than `HONEST_RATIO` times the size of the file.
    """
    if claimed > limit_bytes() and claimed > HONEST_RATIO * path.stat().st_size:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"{path} has {path.stat().st_size / 1e6:.1f} MB and claims to unpack to {claimed / 1e9:.2f} GB, more than "
            f"the limit of {limit_bytes() / 1e9:g} GB.",
            f"If it really holds that much, raise the limit with the environment variable {LIMIT_VARIABLE}.",
        )
