"""Sites that the administrator has disabled: they get no model and their updates do not count, from now on.

NVFlare's `disable_client` keeps a site from connecting anew. A job that the site is in already goes on with it: it
would be sent every global model, and its updates would count, to the end. The server writes the names into a file of
its kit, which the job's process reads here.

NVFlare offers no way to end a task for one site alone: a filter of the task's data that raises ends it for all. So the
site is handed its tasks as before, without what is in them, and answers that it can do nothing with them. No round
waits for it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from pfedsam.errors import ErrorCode, PFedSAMError

logger = logging.getLogger(__name__)

#: Written by NVFlare (`private/fed/server/client_manager.py`, 2.9.0) into the server's kit.
DISABLED_FILE, _KEY = "disabled_clients.json", "disabled_clients"
#: Header of a task that was emptied, so that the site can say why.
WITHHELD = "pfedsam_withheld"
#: Header of a task that was emptied because the site's own download could not be made (`pfedsam.federated.downloads`).
NO_DOWNLOAD = "pfedsam_no_download"


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


def withhold(fl_ctx: FLContext) -> None:
    """Empty the task that the server is about to send, if it goes to a disabled site. Its headers stay.

    Whatever goes wrong here, the task is emptied: nothing is sent to a site that is not known.

    Args:
        fl_ctx: context of the event `AFTER_TASK_DATA_FILTER` at the server. NVFlare makes a copy of the task for each
            site, so the other sites' are as they were.
    """
    data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
    if not isinstance(data, Shareable):
        return
    try:
        names = addressed(fl_ctx)
        away = sorted(names & set(_disabled(Path(fl_ctx.get_engine().get_workspace().get_root_dir()) / DISABLED_FILE)))
        if names and not away:
            return
        why = f"disabled site {', '.join(away)}" if away else "a site whose name is not known"
    except Exception:
        logger.exception("who is disabled could not be found out")
        why = "a site that may be disabled"
    empty(data, WITHHELD)
    logger.warning("task %s goes to %s without a model", fl_ctx.get_prop(FLContextKey.TASK_NAME), why)


def empty(data: Shareable, why: str) -> None:
    """Take all but the headers out of a task that goes to one site, and say why in a header.

    Args:
        data: the site's own copy of the task.
        why: `WITHHELD` or `NO_DOWNLOAD`.
    """
    headers = data.get(ReservedHeaderKey.HEADERS, {})
    data.clear()
    data[ReservedHeaderKey.HEADERS] = headers
    data.set_header(why, True)


def tell_withheld(fl_ctx: FLContext) -> None:
    """Say in the site's log why the task at hand has no model, if the server has kept it back."""
    data = fl_ctx.get_prop(FLContextKey.TASK_DATA)
    if isinstance(data, Shareable) and data.get_header(WITHHELD):
        logger.error("the federation's administrator has disabled this site: this task came without a model")
    elif isinstance(data, Shareable) and data.get_header(NO_DOWNLOAD):
        logger.error("the server could not make what this site downloads: this task came without a model")


def addressed(fl_ctx: FLContext) -> set[str]:
    """The name that the site gives itself, and the one that the server knows it by, from its token."""
    peer = fl_ctx.get_peer_context()
    names = {peer.get_identity_name(default="")} if peer else set()
    workflow = getattr(fl_ctx.get_prop(FLContextKey.RUNNER), "current_wf", None)
    if workflow is not None:
        task = workflow.controller.communicator.process_task_check(fl_ctx.get_prop(FLContextKey.TASK_ID), fl_ctx)
        names |= {task.client.name} if task is not None else set()
    return names - {""}


def _disabled(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text())[_KEY]] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.error("%s could not be read (%s): nobody counts as disabled", path, type(error).__name__)
        return []
