"""How many sites must take part: what a site asks for, and what the server does about it.

The mean of two sites tells each of them the update of the other: `u2 = (w1 + w2) m - w1 u1, over w2`. Of three, each
learns the sum of the other two only. So a site names the least number that it takes part with (`least_sites` in its
settings), a job promises one in its plan, and the server stops a job whose round has fewer contributions. It also stops
a job whose round has fewer than the job's own `min_clients`, and names each site that was missing in a round.

Some rules of the server (`aggregation`) tell more than a mean: the result of `krum` is one site's update, and a number
of `median` or `trimmed_mean` may be that of one site. A site that names a least number refuses a plan in which fewer
than three values make a number.

The site sees what the server *says*: the sites that NVFlare lists in the job's metadata, and the promise of the plan. A
hostile server can list sites that do not exist or take part itself; then no number helps, only noise on the update.
"""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.plan import MISSING_SITES, Plan, plan_of
from pfedsam.federated.records import SITES_FILE, append_record
from pfedsam.federated.settings import SITE_SETTINGS
from pfedsam.training.aggregation import values_behind
from pfedsam.training.judgement import KEPT


def sites_of(fl_ctx: FLContext) -> frozenset[str]:
    """Names of the sites that the server says take part in the job; empty if it says nothing."""
    meta = fl_ctx.get_prop(FLContextKey.JOB_META)
    listed = meta.get(JobMetaKey.JOB_CLIENTS.value) if isinstance(meta, dict) else None
    names = [client.get("name") for client in listed or () if isinstance(client, dict)]
    return frozenset(name for name in names if isinstance(name, str))


def require_enough_sites(fl_ctx: FLContext, plan: Plan, least: int | None) -> None:
    """Refuse a job of fewer sites than this site takes part with.

    Args:
        fl_ctx: context of a task at the site.
        plan: of the job.
        least: `least_sites` of the site's settings, None for any number.

    Raises:
        PFedSAMError: E27 if fewer take part, the plan does not promise that each round has as many, its rule tells the
            numbers of single sites, or its groups of sites with a model of their own may be smaller.
    """
    if least is None:
        return
    remedy = f"Take part with more sites, or let IT set 'least_sites' in local/{SITE_SETTINGS} (`pfedsam site init`)."
    count = len(sites_of(fl_ctx))
    if count < least:
        raise PFedSAMError(
            ErrorCode.TOO_FEW_SITES, f"{count} site(s) take part, this site asks for at least {least}.", remedy
        )
    rule = plan.checked().aggregation
    if values_behind(rule, count) < min(least, KEPT):
        raise PFedSAMError(
            ErrorCode.TOO_FEW_SITES,
            f"the job's rule is '{rule}': of {count} site(s) each number of its result may be that of one or two.",
            "Ask for `aggregation` norm_clipped or mean.",
        )
    downloads = plan.checked().downloads
    # what tells single models is agreed on apart, see `require_unseen`
    if downloads is not None and not downloads.tells_models and downloads.least_size < least:
        raise PFedSAMError(
            ErrorCode.TOO_FEW_SITES,
            f"the job's groups may be of {downloads.least_size} sites, this site asks for at least {least}.",
            f"Ask for `least_size` {least} of `downloads`.",
        )
    if (plan.least_sites or 0) < least:
        raise PFedSAMError(
            ErrorCode.TOO_FEW_SITES,
            f"the job promises rounds of at least {plan.least_sites or 1} site(s), this site asks for {least}.",
            f"Export the job with `--least-sites {least}`. {remedy}",
        )


class LeastSites(FLComponent):
    """At the server: names who took part in each round, and stops the job when too few did.

    It counts what the aggregator has accepted, so a result that the guard has refused does not count. A site is missing
    if the job was handed to it and nothing of it counts. Each round leaves a line in the log and a record in
    `SITES_FILE`. The job stops before the mean becomes the global model, so no site sees it, if a round has

    * fewer sites than the plan promises (`least_sites`) or the job asks for (`min_clients` of its meta.json), or
    * a missing site, and the plan says `fail` of `missing_sites`.

    NVFlare alone closes a round with fewer than `min_clients`: it gives up waiting for sites whose connection is lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._expected: set[str] = set()
        self._accepted: set[str] = set()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Count the sites of a round; stop the job if there are too few when it closes."""
        if event_type == EventType.START_RUN:
            self._expected, self._accepted = set(), set()
        elif event_type == AppEventType.ROUND_STARTED:
            # a site that NVFlare no longer lists is missing, too
            self._expected |= {client.name for client in fl_ctx.get_engine().get_clients()}
            self._accepted = set()
        elif event_type == AppEventType.AFTER_CONTRIBUTION_ACCEPT:
            peer = fl_ctx.get_peer_context()
            if peer and fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED, False):
                self._accepted.add(peer.get_identity_name())
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            self._close(fl_ctx)

    def _close(self, fl_ctx: FLContext) -> None:
        number, there = fl_ctx.get_prop(AppConstants.CURRENT_ROUND), sorted(self._accepted)
        missing = sorted(self._expected - self._accepted)
        run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        append_record(run_dir, SITES_FILE, {"round": number, "sites": there, "missing": missing})
        line = f"round {number}: {len(there)} of {len(there) + len(missing)} sites took part: {', '.join(there)}"
        if missing:
            self.logger.warning(f"{line}; missing: {', '.join(missing)}")
        else:
            self.logger.info(line)
        problem = _problem(number, there, missing, plan_of(fl_ctx), _asked_for(fl_ctx))
        if problem is not None:
            self.logger.error(str(problem))
            self.system_panic(str(problem), fl_ctx)


def _problem(number: int, there: list[str], missing: list[str], plan: Plan, asked: int) -> PFedSAMError | None:
    """Why a round must not count, or None."""
    if len(there) < (plan.least_sites or 0):
        why = f"has contributions of {there} only, the plan promises at least {plan.least_sites} sites"
    elif len(there) < asked:
        why = f"has contributions of {there} only, the job asks for at least {asked} sites (min_clients)"
    elif missing and plan.missing_sites == MISSING_SITES[1]:
        why = f"is without {missing}, and the plan says of missing sites: {plan.missing_sites}"
    else:
        return None
    remedy = "See in the log which sites failed or were refused, then resume the job (`pfedsam job resume`)."
    return PFedSAMError(ErrorCode.TOO_FEW_SITES, f"round {number} {why}.", remedy)


def _asked_for(fl_ctx: FLContext) -> int:
    """The number of sites that NVFlare starts the job with at least, 0 if the job's metadata says none."""
    meta = fl_ctx.get_prop(FLContextKey.JOB_META)
    asked = meta.get(JobMetaKey.MIN_CLIENTS.value) if isinstance(meta, dict) else None
    return asked if isinstance(asked, int) else 0
