"""One version at the server and at all sites: the server says its own beside the global model, each site compares.

A site of another version would train with other defaults, and fail in the middle of a job or, worse, not at all. The
site refuses its first task, before it reads any data. What leaves it is the code alone; the server never hears which
version the site has.
"""

from __future__ import annotations

import nvflare
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from pfedsam import __version__
from pfedsam.errors import ErrorCode, PFedSAMError, shown

#: Metadata of the global model that the server hands out.
VERSIONS_KEY = "pfedsam_versions"


def installed_versions() -> str:
    """What is installed here, for example `pfedsam 0.1.0, nvflare 2.9.0`."""
    return f"pfedsam {__version__}, nvflare {nvflare.__version__}"


def require_same_versions(fl_ctx: FLContext) -> None:
    """Refuse a task of a server that runs other versions than this site.

    Args:
        fl_ctx: context of a task at the site, with its data.

    Raises:
        PFedSAMError: E22 naming the versions of both sides. A server that says none is of an earlier version.
    """
    try:
        said = from_shareable(fl_ctx.get_prop(FLContextKey.TASK_DATA)).get_meta_prop(VERSIONS_KEY)
    except (TypeError, ValueError):  # a task without a model
        said = None
    if said == installed_versions():
        return
    server = "does not say its version: it is an earlier one" if said is None else f"runs {shown(said)}"
    raise PFedSAMError(
        ErrorCode.DEPLOYMENT,
        f"the server {server}; this site has {installed_versions()}.",
        "Install the version that the federation has agreed on here or at the server, and restart the service.",
    )
