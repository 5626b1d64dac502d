"""What left a site in a job, from its own records, checked against NVFlare's audit log; and what may ever leave."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from nvflare.apis.dxo import MetaKey

import pfedsam
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated import boundary, scalars
from pfedsam.federated.packing import PACKED, Precision
from pfedsam.federated.records import CHECKED, LEFT, SCALARS, SENT_FILE
from pfedsam.federated.settings import KIT_DEFAULTS
from pfedsam.files import read_lines
from pfedsam.parameters import MAY_BE_PERSONAL, SHAREABLE_GROUPS, base_group
from pfedsam.storage.job_plan import CLIENT, PLAN_ID, plan_arguments
from pfedsam.training.gap_weights import GAP_DIGITS, LARGEST_GAP, LEAST_GAP
from pfedsam.training.validation import LEAST_COVERED, MOST_COVERED

_SUBMITTED = re.compile(r"\[S:(?P<scope>[^\]]*)\].*\[A:(?P<task>\w+)#[^\]]*\]submit result:? (?P<reply>\S+)")
_ACTION = re.compile(r"\[U:(?P<user>[^\]]*)\]\[A:(?P<action>[^\]]*)\]")
#: Metadata that packing and encryption add behind the allow-list: how the values are to be read.
_ADDED = frozenset({PACKED, MetaKey.PROCESSED_KEYS, MetaKey.PROCESSED_ALGORITHM, MetaKey.FILTER_HISTORY})


@dataclass
class Audit:
    """What is known of a job at a site.

    Attributes:
        job: its id.
        results: what the outgoing filter wrote: each result as the allow-list let it pass (stage `checked`), with the
            filters of its task; the same as it left (`left`); and, last, how often each scalar was sent (`scalars`), or
            at least how often, if the job was killed.
        submitted: results by NVFlare's own audit log: task, privacy scope, reply.
        actions: who did what, by NVFlare's audit log of the site.
        hashes: SHA-256 of each file of the job's app and of the site's policy, and of the installed package.
        shared: the parameter groups that the job's plan shares.
        further: metadata that the plan's strategy lets a site send beside what all strategies do.
        problems: what does not fit together.
    """

    job: str
    results: list[dict[str, Any]]
    submitted: list[dict[str, str]]
    actions: list[dict[str, str]]
    hashes: dict[str, str]
    shared: list[str]
    further: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def stage(self, name: str) -> list[dict[str, Any]]:
        """The records of one stage."""
        return [record for record in self.results if record.get("stage") == name]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def audit(workspace: Path, job: str) -> Audit:
    """Read the records of a job.

    Args:
        workspace: of the site: its startup kit's folder.
        job: the job's id, or the beginning of it.

    Raises:
        PFedSAMError: E02 if there is no such job, or more than one.
    """
    runs = [path for path in workspace.glob(f"{job}*") if (path / "meta.json").is_file()]
    if len(runs) != 1:
        known = sorted(path.parent.name for path in workspace.glob("*/meta.json"))
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER, f"{len(runs)} jobs in {workspace} start with '{job}'.", f"Jobs: {known}."
        )
    run = runs[0]
    log = (run / "audit.log").read_text() if (run / "audit.log").exists() else ""
    site_log = (workspace / "audit.log").read_text() if (workspace / "audit.log").exists() else ""
    files = [*sorted(run.glob("app_*/**/*")), *sorted((workspace / "local").glob("*.json"))]
    result = Audit(
        run.name,
        _with_all_scalars_in_one(read_lines(run / SENT_FILE)),
        [match.groupdict() for match in _SUBMITTED.finditer(log)],
        [match.groupdict() for match in _ACTION.finditer(site_log) if match["user"]],
        {
            str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.is_file()
        },
        *_planned(run),
    )
    result.hashes[f"installed package pfedsam {pfedsam.__version__}"] = _package_hash()
    result.problems = list(_problems(result))
    return result


def _with_all_scalars_in_one(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with the counts of all records of scalars added up in the first of them, which comes last."""
    others = [record for record in records if record.get("stage") != SCALARS]
    counted = [record for record in records if record.get("stage") == SCALARS]
    total: Counter[str] = Counter()
    for record in counted:
        total.update(record["tags"])
    return [*others, *({**record, "tags": dict(total)} for record in counted[:1])]


def _package_hash() -> str:
    """SHA-256 over names and contents of the package's Python files."""
    root, digest = Path(pfedsam.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _planned(run: Path) -> tuple[list[str], list[str]]:
    """The groups that the job says it shares, and the further metadata of its strategy; nothing if it has no plan."""
    for path in run.glob(f"app_*/config/{CLIENT}"):
        if any(component.get("id") == PLAN_ID for component in json.loads(path.read_text()).get("components", ())):
            strategy = plan_arguments(path.parents[1], CLIENT)["strategy"]
            return list(strategy["shared"]), list(boundary.METADATA_BY_WEIGHTS.get(strategy.get("weights"), ()))
    return [], []


def _problems(job_audit: Audit) -> list[str]:
    problems = []
    # NVFlare's own codes (a task that failed or was aborted) go out without a result, past no filter
    submitted, left = sum(submission["reply"] == "OK" for submission in job_audit.submitted), len(job_audit.stage(LEFT))
    if submitted != left:
        problems.append(f"NVFlare says that {submitted} results were submitted, the filter saw {left}")
    outside = sorted({submission["scope"] for submission in job_audit.submitted} - {"pfedsam"})
    if outside:
        problems.append(f"results left under the privacy scope {outside}, not under the site's own 'pfedsam'")
    for number, record in enumerate(job_audit.stage(CHECKED), 1):
        above = sorted(set(record.get("by_group", {})) - (SHAREABLE_GROUPS & set(map(base_group, job_audit.shared))))
        if above:
            problems.append(f"result {number}: group(s) {above} are not shared by the job's plan, or may never leave")
    fine = boundary.LISTED_NAMES | set(job_audit.further)
    for stage, listed in ((CHECKED, fine), (LEFT, fine | _ADDED)):
        more = sorted({name for record in job_audit.stage(stage) for name in record.get("metadata", ())} - listed)
        if more:
            problems.append(f"metadata or metrics that are not listed are in results of stage '{stage}': {more[:3]}")
    unlisted = sorted(
        tag for record in job_audit.stage(SCALARS) for tag in record["tags"] if not scalars.LISTED.fullmatch(tag)
    )
    if unlisted:
        problems.append(f"scalars were sent under tags that are not listed: {unlisted[:3]}")
    carried = [name for name in job_audit.hashes if "/custom/" in name and not name.endswith("README.md")]
    if carried:
        problems.append(f"the job carried code: {carried[:3]}")
    return problems


def statement() -> str:
    """The data-flow statement for a privacy officer, as Markdown: every list in it is read from the code."""
    page = Environment(loader=PackageLoader("pfedsam.deployment", "."), undefined=StrictUndefined, autoescape=False)
    return page.get_template("statement.md.j2").render(
        version=pfedsam.__version__,
        shared=sorted(SHAREABLE_GROUPS),
        personal=sorted(MAY_BE_PERSONAL - SHAREABLE_GROUPS),
        metadata=boundary.METADATA,
        by_weights=boundary.METADATA_BY_WEIGHTS,
        gap=(
            boundary.GAP_KEY,
            f"from 0 to {LARGEST_GAP:g}",
            f"{GAP_DIGITS} significant digits, none below {LEAST_GAP:g}",
        ),
        meanings=boundary.MEANINGS,
        step=10.0**-boundary.METRIC_DECIMALS,
        metrics=boundary.METRICS,
        added=sorted(_ADDED),
        beside=MetaKey.INITIAL_METRICS,
        decimals=boundary.METRIC_DECIMALS,
        tags=scalars.TAGS,
        phases=scalars.PHASES,
        defaults=KIT_DEFAULTS,
        precisions=get_args(Precision),
        covered=(LEAST_COVERED, MOST_COVERED),
        tasks=boundary.MODEL_TASKS,
        codes={code.value: code.meaning for code in ErrorCode},
        largest=boundary.LARGEST_VALUE,
    )
