"""NVFlare's version at the server and at every connected site, before a job is submitted.

pFedSAM's own version is compared at each site when the job starts, see `pfedsam.federated.versions`.
"""

from __future__ import annotations

from nvflare.fuel.flare_api.api_spec import AuthorizationError, NoClientsAvailable
from nvflare.fuel.flare_api.flare_api import Session

from pfedsam.errors import ErrorCode, PFedSAMError

_SERVER = "server"


def nvflare_versions(session: Session) -> dict[str, str] | None:
    """NVFlare's version by site, the server's under `server`; sites that do not tell it are left out.

    Args:
        session: of an administrator.

    Returns:
        None if the server's policy gives this administrator no versions.
    """
    try:
        answer = session.report_version("all")
    except AuthorizationError:
        return None
    except NoClientsAvailable:
        answer = session.report_version(_SERVER)
    told = {site: said.get("version") for site, said in answer.items() if isinstance(said, dict)}
    return {site: str(version) for site, version in told.items() if version}


def require_same_nvflare(session: Session) -> dict[str, str] | None:
    """Refuse to submit to sites whose NVFlare is another than the server's.

    Returns:
        As `nvflare_versions`.

    Raises:
        PFedSAMError: E22 naming the sites and the versions.
    """
    versions = nvflare_versions(session)
    if versions is None or _SERVER not in versions:
        return versions
    server = versions[_SERVER]
    others = [f"{site} {version}" for site, version in sorted(versions.items()) if version != server]
    if others:
        raise PFedSAMError(
            ErrorCode.DEPLOYMENT,
            f"the server runs NVFlare {server}, other versions run at: {', '.join(others)}.",
            "Let their IT install the version that the federation has agreed on; the job was not submitted.",
        )
    return versions
