"""No job runs where NVFlare sends a site's logs to the server: they name cases and paths."""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.logging.constants import is_log_streaming_allowed

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.job_plan import CLIENT

#: Components of NVFlare that send a site's log files to the server.
LOG_SENDERS = ("SiteLogStreamer", "JobLogStreamer", "JobLogReceiver")


def require_no_log_streaming(fl_ctx: FLContext, app: str | Path) -> None:
    """Refuse to work where NVFlare sends the site's logs to the server, as it does from a kit as it is provisioned.

    The simulator, where all logs lie on one machine, is exempt.

    Args:
        fl_ctx: context of a task at the site.
        app: the job's app folder at the site. A site that runs with settings from before `pfedsam site init` has put
            its sender into the configuration there.

    Raises:
        PFedSAMError: E01. Its sentence is in a log that leaves, so it names nothing of the site.
    """
    if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False):
        return
    config = Path(app) / "config" / CLIENT
    sends = config.is_file() and any(name in config.read_text() for name in LOG_SENDERS)
    if sends or is_log_streaming_allowed(fl_ctx):
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS,
            "NVFlare may send the logs of this site, which name cases and paths, to the server.",
            "Stop the site, run `pfedsam site init <kit>`, and start it again.",
        )
