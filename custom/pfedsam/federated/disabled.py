"""Sites that the administrator has disabled: their updates do not count, not even in the job that runs.

NVFlare's `disable_client` keeps a site from connecting anew. A job that the site is in already goes on with it, and its
updates would count to the end. The server writes the names into a file of its kit, which the job's process reads here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError

logger = logging.getLogger(__name__)

#: Written by NVFlare (`private/fed/server/client_manager.py`, 2.9.0) into the server's kit.
DISABLED_FILE, _KEY = "disabled_clients.json", "disabled_clients"


def require_enabled(site: str, kit: str | Path) -> None:
    """Refuse a disabled site.

    Args:
        site: name of the site.
        kit: folder of the server's kit.

    Raises:
        PFedSAMError: E20 if the site is disabled.
    """
    if site in _disabled(Path(kit) / DISABLED_FILE):
        raise PFedSAMError(
            ErrorCode.REFUSED_BY_GUARD,
            f"the administrator has disabled site '{site}'.",
            "`enable_client` in NVFlare's console lets it in again.",
        )


def _disabled(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text())[_KEY]] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.error("%s could not be read (%s): nobody counts as disabled", path, type(error).__name__)
        return []
