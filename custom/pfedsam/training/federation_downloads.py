"""What each site downloads next, kept with the rounds of a federation in one process: `downloads/<rounds done>`."""

from __future__ import annotations

from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.training.beside_rounds import beside_round
from pfedsam.training.site_downloads import SiteDownloads
from pfedsam.training.strategy import Strategy

#: Folder of them beside the rounds.
DOWNLOADS = "downloads"


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
    path = beside_round(folder, DOWNLOADS, done)
    if done and not downloads.load(path, done):
        raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"{path} is not of {done} rounds.", "Begin the run anew.")
    return downloads
