"""What a job asks of a site, held against what the site allows: the learner's own checks, before there is a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey

from pfedsam.deployment.allowed_classes import needed_classes
from pfedsam.deployment.job_files import META, check_settings, find_job, plan_settings, read_json, server_settings
from pfedsam.deployment.job_privacy import NOISE
from pfedsam.deployment.kits import FILTER
from pfedsam.deployment.site_check import Finding
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.learner import FILTERED_TASKS
from pfedsam.federated.least_sites import require_enough_sites
from pfedsam.federated.literals import require_literal
from pfedsam.federated.plan import Plan
from pfedsam.federated.privacy import ClipAndNoise, require_policy
from pfedsam.federated.settings import SiteSettings, require_agreed, require_epochs, require_round, require_unseen
from pfedsam.files import hash_of
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE

#: Of the federation where there is no job that names one.
NO_FEDERATION = "rehearsal"


@dataclass(frozen=True)
class Terms:
    """A job, read.

    Attributes:
        job: its folder.
        plan: what it trains.
        rounds, sites: how many rounds, and with how many sites at least.
        filters: outgoing filters of a round's result behind ours: `path` and `args`.
        agreed: it is a folder from the administrator, and not a packaged job with defaults.
        digest: SHA-256 of its configuration: two people with the same job see the same.
    """

    job: Path
    plan: Plan
    rounds: int
    sites: int
    filters: list[dict[str, Any]]
    agreed: bool
    digest: str


def read_terms(
    job: str, bundle: str | None = None, overrides: Mapping[str, Any] | None = None, federation: str | None = None
) -> Terms:
    """Read a job.

    Args:
        job: a job folder, or the name of a packaged job.
        bundle, overrides: in place of what a packaged job says.
        federation: of a packaged job.

    Raises:
        PFedSAMError: E28 or E29 if it is none, E16 or E18 for settings that no site could run, E32 if a job from the
            administrator shall have another bundle or other settings.
    """
    folder, agreed = find_job(job), (Path(job) / META).is_file()
    check_settings(folder, {}, {})
    arguments, server = plan_settings(folder), server_settings(folder)
    if agreed and (bundle or overrides):
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"{job} is a job of a federation: it says its bundle and its settings itself.",
            "Leave out --bundle and --set, or ask the administrator for another job.",
        )
    if not agreed:
        arguments |= {
            "bundle": bundle or arguments["bundle"],
            "overrides": {**arguments["overrides"], **(overrides or {})},
        }
        arguments["federation"] = federation or NO_FEDERATION
    client = read_json(folder / "app" / "config" / CLIENT)
    digest = hash_of([arguments, server, client])
    filters = [one for one in _chain(client, FILTERED_TASKS[0]) if one.get("path") != FILTER]
    plan = Plan(**arguments)
    return Terms(folder, plan, int(server["num_rounds"]), int(server["min_clients"]), filters, agreed, digest)


def check_terms(
    terms: Terms, site: SiteSettings, allowed: Sequence[str] | None, code_denied: bool
) -> Iterator[Finding]:
    """Hold a job against the site's settings, one line each.

    Args:
        terms: of the job.
        site: settings of the site.
        allowed: the classes that the site's kit allows; None without a kit.
        code_denied: whether the site's kit denies code in jobs.
    """
    app, plan = terms.job / "app", terms.plan
    yield _tried("job: plan", lambda: _told_plan(plan))
    if not terms.agreed:
        return
    yield _tried("job: plain words", lambda: _literal(app))
    yield _check_code(app, code_denied)
    yield _check_classes(app, allowed)
    yield _check_filters(app)
    yield _tried("job: federation", lambda: _agreed(plan, site))
    yield _tried("job: sites", lambda: _enough(terms, site))
    yield _tried("job: downloads", lambda: _downloads(plan, site))
    yield _tried("job: length", lambda: _length(terms, site))
    yield _tried("job: clip and noise", lambda: _noise(terms, site))


def _tried(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except PFedSAMError as error:
        return Finding(name, False, str(error))


def _told_plan(plan: Plan) -> str:
    strategy = plan.checked()
    settings = ", ".join(f"{key}={value}" for key, value in (plan.overrides or {}).items()) or "none"
    return f"bundle '{plan.bundle}', strategy '{strategy.name}', settings of the job: {settings}"


def _agreed(plan: Plan, site: SiteSettings) -> str:
    require_agreed(plan.federation, site)
    return f"'{plan.federation}'"


def _literal(app: Path) -> str:
    require_literal(app, CLIENT)
    if (app / "config" / PLAN_FILE).is_file():
        require_literal(app, PLAN_FILE)
    return "no expression, no path, no variable of the machine"


def _check_code(app: Path, denied: bool) -> Finding:
    carries = (app / "custom").is_dir() and any((app / "custom").rglob("*"))
    if not carries:
        return Finding("job: code", True, "it carries none")
    text = f"{app / 'custom'} is there: NVFlare takes the job as one with code"
    if denied:
        return Finding("job: code", False, f"{text}, and this site denies it. Ask for one made with --locked.")
    return Finding("job: code", True, f"{text}. Such code can read what the site can read.", warning=True)


def _check_classes(app: Path, allowed: Sequence[str] | None) -> Finding:
    known = set(needed_classes(CLIENT) if allowed is None else allowed)
    named = set(_paths(read_json(app / "config" / CLIENT)))
    missing = sorted(named - known)
    if missing:
        return Finding("job: classes", False, f"not allowed here: {missing}. Ask the administrator what they are.")
    return Finding("job: classes", True, f"{len(named)} classes, all allowed here")


def _paths(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("path"), str):
            yield node["path"]
        node = list(node.values())
    for value in node if isinstance(node, list) else ():
        yield from _paths(value)


def _chain(client: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """The outgoing filters that a job names for a task."""
    entries = client.get("task_result_filters") or ()
    return [one for entry in entries if task in entry.get("tasks", ()) for one in entry.get("filters", ())]


def _check_filters(app: Path) -> Finding:
    client = read_json(app / "config" / CLIENT)
    for task in FILTERED_TASKS:
        first = (_chain(client, task) or [{}])[0].get("path")
        if first != FILTER:
            told = f"E15: the first outgoing filter of task '{task}' is {first}, expected {FILTER}."
            return Finding("job: filters", False, told)
    others = [str(one["path"]).rpartition(".")[2] for one in _chain(client, FILTERED_TASKS[0])[1:]]
    return Finding("job: filters", True, f"the first is {FILTER}, then {', '.join(others) or 'none'}")


def _enough(terms: Terms, site: SiteSettings) -> str:
    """As the site would see it if only as many sites took part as the job waits for."""
    context = FLContext()
    sites = [{"name": str(number)} for number in range(terms.sites)]
    context.set_prop(FLContextKey.JOB_META, {JobMetaKey.JOB_CLIENTS.value: sites}, private=True, sticky=False)
    require_enough_sites(context, terms.plan, site.least_sites)
    return f"the job waits for {terms.sites}, promises {terms.plan.least_sites or 1}, this site asks for " + (
        str(site.least_sites) if site.least_sites else "any number"
    )


def _downloads(plan: Plan, site: SiteSettings) -> str:
    strategy = plan.checked()
    require_unseen(strategy, site)
    downloads = strategy.downloads
    if downloads is None:
        return "all sites get the same model"
    if downloads.tells_models:
        return f"{downloads.kind}: another site can read this site's model, and this site has agreed to that"
    return f"groups of at least {downloads.least_size} similar sites have a model each"


def _length(terms: Terms, site: SiteSettings) -> str:
    strategy = terms.plan.checked()
    require_epochs(strategy, site)
    require_round(terms.rounds - 1, site)
    in_round, final = sum(phase.epochs for phase in strategy.phases), sum(strategy.final_epochs)
    return f"{terms.rounds} rounds of {in_round} epoch(s), {final} in the final phase"


def _noise(terms: Terms, site: SiteSettings) -> str:
    noise = []
    for one in terms.filters:
        if one.get("path") == NOISE:
            with suppress(TypeError, ValueError):  # such a one is none
                noise.append(ClipAndNoise(**one.get("args", {})))
    require_policy(noise, site.largest_clip, site.least_noise)
    return ", ".join(f"clip {one.clip:g}, noise {one.noise_multiplier:g}" for one in noise) or "none, none asked for"
