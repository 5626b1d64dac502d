"""What each site downloads next, kept with the rounds of a federation in one process: `downloads/<rounds done>`."""

from __future__ import annotations

from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.training.site_downloads import SiteDownloads
from pfedsam.training.strategy import Strategy

_FOLDER = "downloads"


def begun_downloads(strategy: Strategy, folder: Path, done: int) -> SiteDownloads | None:
    """The downloads after so many rounds; None for a strategy in which all sites download the same.

    Args:
        strategy: of the federation.
        folder: of the rounds.
        done: number of rounds behind the global model.

    Raises:
        PFedSAMError: E33 if they were not kept, or cannot be read.
    """
    if strategy.downloads is None:
        return None
    downloads = SiteDownloads(strategy.downloads, strategy.aggregation)
    if done and not downloads.load(_file(folder, done), done):
        raise PFedSAMError(
            ErrorCode.RUN_INCOMPLETE, f"{_file(folder, done)} is not of {done} rounds.", "Begin the run anew."
        )
    return downloads


def save_downloads(downloads: SiteDownloads | None, folder: Path, done: int) -> None:
    """Keep what the next round begins with; before the global model is written, which says that the round is done."""
    if downloads is not None:
        downloads.save(_file(folder, done))


def forget_downloads(folder: Path, done: int) -> None:
    """Remove those of earlier rounds; once the global model is written."""
    for path in (folder / _FOLDER).glob("*.safetensors"):
        if int(path.stem) < done:
            path.unlink()


def _file(folder: Path, done: int) -> Path:
    return folder / _FOLDER / f"{done}.safetensors"
