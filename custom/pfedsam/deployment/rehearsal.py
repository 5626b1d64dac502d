"""A dry run of one site with its real data, before it joins: everything that a job does there but the network.

What was looked at becomes findings, as in `site_check`; what a small round was is measured. What no dry run of one site
can know is said, too, in `unverified`. Nothing is sent, and what is written lies in a temporary folder that is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pfedsam.data.checks import check_site
from pfedsam.data.expected import expected_by
from pfedsam.data.site_folder import read_site
from pfedsam.data.site_report import SiteReport
from pfedsam.deployment.kits import RESOURCES, is_server
from pfedsam.deployment.rehearsal_messages import Asked, Measured
from pfedsam.deployment.rehearsal_terms import Terms
from pfedsam.deployment.site_check import Finding
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.settings import FURTHER, KIT_DEFAULTS, SITE_SETTINGS, SiteSettings, read_settings, site_folder

_PREFIX = "pfedsam-rehearsal-"
#: Of `check_kit`: whether the server's port answers. It is no part of a dry run, and no fault of the site.
SERVER = "server"
#: Of `check_kit`: whether code in jobs is denied.
CODE = "code in jobs"


@dataclass(frozen=True)
class Site:
    """What is rehearsed: a startup kit with its settings, or a data folder with those that a kit begins with.

    Attributes:
        name: of the site.
        folder: of its data.
        settings: its own.
        kit: None where there is only a data folder.
    """

    name: str
    folder: Path
    settings: SiteSettings
    kit: Path | None

    def allowed_classes(self) -> list[str] | None:
        """The classes that the kit allows; None without a kit."""
        if self.kit is None:
            return None
        with suppress(OSError, ValueError):
            return list(json.loads((self.kit / "local" / RESOURCES).read_text()).get("class_allow_list", ()))
        return []


def find_site(path: Path, changed: Mapping[str, Any] | None = None) -> Site:
    """The site of a startup kit or of a data folder.

    Args:
        path: either of them.
        changed: settings in place of the site's own, for this rehearsal.

    Raises:
        PFedSAMError: E01 for a server's kit or wrong settings, E02 if there are no data.
    """
    given = dict(changed or {})
    if (path / "startup").is_dir():
        if is_server(path):
            raise PFedSAMError(
                ErrorCode.SITE_SETTINGS, f"{path} is the kit of a server, which has no data.", "Give a site's kit."
            )
        settings = read_settings(path / "local" / SITE_SETTINGS).model_copy(update=given)
        client = json.loads((path / "startup" / "fed_client.json").read_text()).get("client", {})
        name = str(client.get("fqsn", path.name))
        return Site(name, site_folder(settings.data_root, name), settings, path)
    read_site(path)
    return Site(path.resolve().name, path, SiteSettings(**{**KIT_DEFAULTS, **given}), None)


def check_data(
    site: Site, terms: Terms, progress: Callable[[int, int], None] | None = None
) -> tuple[SiteReport, float]:
    """Read and check all cases, as a job does at its start; the report, and the seconds that it took."""
    expected, started = expected_by(terms.plan.bundle, terms.plan.overrides, site.settings.labels), time.monotonic()
    report = check_site(site.folder, **expected, progress=progress)
    return report, time.monotonic() - started


def asked(site: Site, terms: Terms, report: SiteReport, work: Path, cases: int) -> Asked:
    """What the small round is to do."""
    from pfedsam.training.rehearsal import first_cases

    plan, settings = terms.plan, site.settings
    training = sum(row.section == "training" for row in report.cases)
    return Asked(
        plan={key: value for key, value in vars(plan).items() if not key.startswith("_")},
        filters=terms.filters,
        folder=str(site.folder.resolve()),
        site=site.name,
        work=str(work),
        first=first_cases(report),
        cases=min(cases, training) if cases else training,
        all_cases=training,
        keeps_prepared=settings.prepared_root is not None,
        may_share=settings.may_share,
        may_tell=settings.allowed(FURTHER),
        label_map=settings.labels,
        checkpoint=settings.checkpoint,
        device=settings.device or "auto",
        threads=settings.threads,
        least_validation_cases=settings.least_validation_cases,
    )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that only this user may enter. It goes at the end, and so do those of rehearsals that were killed.

    Raises:
        PFedSAMError: E13 if it could not be removed: it holds pictures of patients.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        number = left.name.removeprefix(_PREFIX).partition("-")[0]
        with suppress(OSError):
            if number.isdigit() and not psutil.pid_exists(int(number)) and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise PFedSAMError(
                ErrorCode.PERSONAL_STATE,
                f"the temporary folder {folder} could not be removed: it holds data of patients.",
                "Remove it by hand.",
            )


@dataclass(frozen=True)
class Needs:
    """What a job will need at this site, by what the small round has needed. Estimates.

    Attributes:
        start_minutes: to read and check all cases.
        first_round_minutes, round_minutes, final_minutes: of training and validation, without waiting for others.
        job_minutes: of the whole job.
        memory_gib: peak of the small round; the features of more cases come on top, up to `cache_gib`.
        cache_gib: what features may take, in memory, or on disk where the site keeps prepared volumes.
        disk_gib: state (three files) and prepared volumes.
        megabytes: that leave the site in a round.
    """

    start_minutes: float
    first_round_minutes: float
    round_minutes: float
    final_minutes: float
    job_minutes: float
    memory_gib: float
    cache_gib: float
    disk_gib: float
    megabytes: float


def needs(measured: Measured, asked: Asked, terms: Terms, check_seconds: float) -> Needs:
    """Scale what a small round was to all training cases and all epochs."""
    from pfedsam.bundles import literals_of

    strategy, seconds = terms.plan.checked(), measured.seconds
    scale = asked.all_cases / max(measured.cases, 1)
    steps = {phase.name: measured.steps.get(phase.name, 0) for phase in strategy.phases}
    once = max(sum(steps.values()), 1)
    all_epochs = sum(steps[phase.name] * phase.epochs for phase in strategy.phases)
    per_step, first_step = seconds["later"] / once, seconds["first"] / once
    later = per_step * all_epochs * scale + seconds["validate"]
    first = later + max(first_step - per_step, 0) * once * scale
    epochs = sum(strategy.final_epochs) / max(len(strategy.final), 1)
    everywhere = seconds["validate"] * measured.validation_cases / max(measured.validated, 1)
    final = max(seconds["final"] - seconds["validate"], 0) * epochs * scale + 2 * everywhere
    prepared = measured.prepared_bytes / max(measured.prepared_cases, 1) * (asked.all_cases + measured.validation_cases)
    start = check_seconds + seconds["open"]
    job = start + first + later * max(terms.rounds - 1, 0) + final
    return Needs(
        start_minutes=round(start / 60, 2),
        first_round_minutes=round(first / 60, 2),
        round_minutes=round(later / 60, 2),
        final_minutes=round(final / 60, 2),
        job_minutes=round(job / 60, 1),
        memory_gib=round(measured.memory_bytes / 2**30, 2),
        cache_gib=float(literals_of(terms.plan.bundle, terms.plan.overrides).get("cache_limit_gb") or 0),
        disk_gib=round((3 * measured.state_bytes + prepared) / 2**30, 2),
        megabytes=round(measured.leaves.bytes / 1e6, 2),
    )


def enough(site: Site, needed: Needs) -> Iterator[Finding]:
    """Whether this machine has what the job needs, as far as is known."""
    total = psutil.virtual_memory().total / 2**30
    text = f"{needed.memory_gib:.1f} GiB at the peak, {total:.1f} GiB in the machine"
    yield Finding("memory of a round", needed.memory_gib < total, text, warning=needed.memory_gib > 0.7 * total)
    root = next(p for p in (Path(site.settings.state_root or Path.home()).expanduser(), Path("/")) if p.exists())
    free = shutil.disk_usage(root).free / 2**30
    text = f"{needed.disk_gib:.2f} GiB of state and prepared volumes, {free:.1f} GiB free at {root}"
    yield Finding("disk of a job", needed.disk_gib < free, text)


def unverified(site: Site, terms: Terms, asked: Asked, measured: Measured | None, reachable: str | None) -> list[str]:
    """What this dry run could not see, in words."""
    told = [
        "the connection: TLS, a proxy or a firewall on the way, hours of silence; "
        + (f"only this was tried: {reachable}" if reachable else "nothing was tried"),
        "whether the server accepts this site's certificate, and whether it is the server that it says it is",
        "the other sites: their number, their data, and whether their version, base weights and bundle are the same",
        "the server: what it does with what it gets, and whether the job that comes is the one rehearsed here",
        "what the federation's models are worth on this site's patients: a few steps of training say nothing of that",
        "a whole job: the estimates are scaled from a small round on this machine as busy as it was",
        "the service: it may run as another user, with other rights, another PATH and less memory than this command",
    ]
    if site.kit is None:
        told.append("the kit: there was none, so neither certificates nor policy were looked at")
    if not terms.agreed:
        told.append(f"the federation's own job: this was the packaged '{terms.job.name}' (--job <folder> takes it)")
    if measured is None:
        return [*told, "training, state and boundary: the small round was not run to its end"]
    if measured.cases < asked.all_cases:
        told.append(f"training on more than {measured.cases} of {asked.all_cases} training cases (--cases 0 takes all)")
    if measured.validated < measured.validation_cases:
        told.append(f"validation on more than {measured.validated} of {measured.validation_cases} cases")
    told += [f"the filter {name} of the job: it needs the federation" for name in measured.leaves.not_done]
    if not measured.device.startswith("cuda"):
        told.append("a GPU: it was computed on the CPU")
    return told
