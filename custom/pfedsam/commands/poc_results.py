"""What `pfedsam poc` shows of a deployment: the sites' news while they train, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape

from pfedsam.commands.console import console
from pfedsam.errors import ErrorCode, PFedSAMError


def show_results(deployment: Any, federation: str, sites: dict[str, Path], job: str, overrides: dict[str, Any]) -> None:
    """The per-site table, from each site's own state."""
    from pfedsam.commands.evaluation import show_evaluation
    from pfedsam.deployment.job_files import find_job, plan_settings

    models = {}
    for site in deployment.sites:
        models[site] = (sites[site], newest_state(deployment, federation, site))
    bundle = plan_settings(find_job(job))["bundle"]
    console.print("Few short rounds: this shows that the deployment works, not how good the method is.")
    show_evaluation(models, bundle, overrides, deployment.root / "results", _sent(deployment))


#: What a federation on one machine cannot tell of one between hospitals.
NOT_PROVED = (
    "the network between hospitals: names, firewalls, proxies (poc_workspace/running.md)",
    "your own data, and how good the model is on them (pfedsam site rehearse, pfedsam compare)",
    "a GPU's memory and speed, and hours of training",
    "what comes later: certificates that end, sites that join, leave or are removed (poc_workspace/life.md)",
    "that nothing can be learned from the updates that were sent: see the threat model in poc_workspace/README.md",
)


def show_proof(deployment: Any) -> None:
    """What the run has proved, each checked now, and what it has not.

    Raises:
        PFedSAMError: E22 if a site's audit finds something that does not fit together.
    """
    console.print("Proved on this machine:", style="bold")
    for sentence in proofs(deployment):
        console.print(f"  + {sentence}", highlight=False, soft_wrap=True)
    console.print("Not proved:", style="bold")
    for sentence in NOT_PROVED:
        console.print(f"  - {sentence}", highlight=False, soft_wrap=True)


def proofs(deployment: Any) -> Iterator[str]:
    """What the sites' own records of their last job say, once everything is stopped.

    Raises:
        PFedSAMError: E22 as `show_proof`.
    """
    from pfedsam.deployment.audit import audit
    from pfedsam.federated.records import CHECKED, LEFT

    sites, left, stayed = deployment.sites, 0, 0
    yield f"server and {len(sites)} sites ran as processes of their own, and each side showed the other its certificate"
    yield "a job without code was submitted, ran to its end, and its global model was fetched"
    for site in sites:
        kit, job = deployment.kit(site), _last_run(deployment, site).name
        found = audit(kit, job)
        if found.problems:
            what = f"the audit of site {site} found: {found.problems[0]}."
            raise PFedSAMError(ErrorCode.DEPLOYMENT, what, f"See `pfedsam audit {kit} {job}`.")
        left += len(found.stage(LEFT))
        stayed += sum(int(record.get("excluded") or 0) for record in found.stage(CHECKED))
    yield f"all {left} results that left passed the sites' own filter, which kept {stayed} personal tensors back"
    yield f"each site keeps a personal model of its own: {', '.join(sites)}"
    if not deployment.processes():
        yield "nothing is left running"


def _last_run(deployment: Any, site: str) -> Path:
    """Folder of a site's last job."""
    from pfedsam.storage.run_folder import SENT_FILE

    return max(deployment.kit(site).glob(f"*/{SENT_FILE}"), key=lambda path: path.stat().st_mtime).parent


def newest_state(deployment: Any, federation: str, site: str) -> Path:
    """The file of a site's personal model after the run (E13 if there is none)."""
    from pfedsam.storage.state_list import newest_states

    entry = newest_states(deployment.state_root(site), federation).get(site)
    if entry is None:
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE, f"site {site} has kept no readable state.", f"See {deployment.log(site)}."
        )
    return entry.file


def _sent(deployment: Any) -> dict[str, dict[int, int]]:
    """Bytes that left each site in the rounds of its last job, by its own records."""
    from pfedsam.storage.run_folder import SENT_FILE, bytes_by_round

    sent = {}
    for site in deployment.sites:
        files = sorted(deployment.kit(site).glob(f"*/{SENT_FILE}"), key=lambda path: path.stat().st_mtime)
        sent[site] = bytes_by_round(files[-1:])
    return sent


class News:
    """Shows the lines of the sites' logs that a person waits for."""

    def __init__(self, deployment: Any, job_id: str, show: Any) -> None:
        self.logs = {site: deployment.kit(site) / job_id / "log.txt" for site in deployment.sites}
        self.read = dict.fromkeys(self.logs, 0)
        self.show = show

    def __call__(self) -> None:
        """Look once."""
        from pfedsam.federated.records import PROGRESS_LINE

        for site, log in self.logs.items():
            text = log.read_text(errors="replace") if log.exists() else ""
            lines = PROGRESS_LINE.findall(text)
            for line in lines[self.read[site] :]:
                console.print(f"  {site}: {line}", highlight=False)
                self.show(escape(f"{site}: {line}"))
            self.read[site] = len(lines)
