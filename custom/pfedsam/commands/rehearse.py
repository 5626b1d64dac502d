"""`pfedsam site rehearse`: a dry run of one site with its real data, before it joins."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pfedsam import defaults
from pfedsam.commands.console import Overrides, bar, console, literals
from pfedsam.commands.interrupts import ends_in_order
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import require_free

if TYPE_CHECKING:
    from pfedsam.deployment.rehearsal import Needs, Site
    from pfedsam.deployment.rehearsal_boundary import Leaving
    from pfedsam.deployment.rehearsal_messages import Measured
    from pfedsam.deployment.rehearsal_terms import Terms
    from pfedsam.deployment.site_check import Finding

_STOPPED = "Nothing was sent, and the temporary folder was removed."


def rehearse(
    site: Annotated[Path, typer.Argument(help="Startup kit after `site init`, or a site folder of data.")],
    job: Annotated[
        str, typer.Option(help="Job folder that the administrator will submit, or the name of a packaged job.")
    ] = defaults.STRATEGY,
    bundle: Annotated[str | None, typer.Option(help="Of a packaged job: another installed bundle.")] = None,
    cases: Annotated[int, typer.Option(min=0, help="Training cases of the small round; 0 takes all.")] = 4,
    labels: Annotated[str | None, typer.Option(help='What label values mean, without a kit: {"1": "disc"}')] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="SAM's base weights on this machine.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda:0 ...")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write what was found as JSON; it names no case, and only you may read it.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Rehearse one site with its real data: everything of a job but the network. Exit code 1 if something is wrong.

    Looks at the kit and the data, holds the job against the site's own settings, trains a small round with the job's
    strategy, validates, writes the personal state into a temporary folder and removes it, and says which tensors and
    numbers would leave the site. Estimates time, memory and disk. In the end it says what it did NOT verify.
    """
    changed = {
        "labels": _meanings(labels),
        "checkpoint": checkpoint and str(checkpoint.resolve()),
        "device": device,
        "threads": threads,
    }
    given = {key: value for key, value in changed.items() if value is not None}
    with ends_in_order(_STOPPED):
        Rehearsal(given).run(site, job, bundle, literals(set_ or []), cases, report)


class Rehearsal:
    """The steps of a rehearsal, each printed as soon as it is known.

    Args:
        changed: settings in place of the site's own.
    """

    def __init__(self, changed: dict[str, Any]) -> None:
        self.changed = changed
        self.findings: list[Finding] = []
        self.reachable: str | None = None

    def run(
        self, path: Path, job: str, bundle: str | None, overrides: dict[str, Any], cases: int, out: Path | None
    ) -> None:
        """Rehearse, and end the command with its exit code."""
        if out is not None:
            require_free(out, False)
        with console.status("loading libraries"):
            from pfedsam.deployment.rehearsal import asked, check_data, find_site, temporary_folder, unverified
            from pfedsam.deployment.rehearsal_terms import read_terms

        site = find_site(path, self.changed)
        federation = (site.settings.federations or (None,))[0]
        terms = read_terms(job, bundle, overrides, federation)
        _say(f"Rehearsal of site '{site.name}' with job {terms.job} (SHA-256 {terms.digest[:16]}). Nothing is sent.")
        self._kit(site)
        self._terms(site, terms)
        with bar("reading all cases", 1) as advance:
            data, seconds = check_data(site, terms, advance.total)
        self._data(data)
        measured, needed = None, None
        with temporary_folder() as work:
            ask = asked(site, terms, data, work, cases)
            if all(finding.fine for finding in self.findings if finding.name in _NEEDED):
                measured = self._round(ask)
        self._tell("temporary folder", f"removed: {work}")
        if measured is not None:
            needed = self._needs(site, terms, measured, ask, seconds)
        unknown = unverified(site, terms, ask, measured, self.reachable)
        _say("\nNOT verified:", *(f"- {line}" for line in unknown), sep="\n  ")
        wrong = [finding for finding in self.findings if not finding.fine]
        if out is not None:
            _write(out, site, terms, self.findings, measured, needed, unknown)
        _say(f"\n{len(wrong)} thing(s) WRONG: mend them before the site joins." if wrong else "\nNothing was wrong.")
        raise typer.Exit(1 if wrong else 0)

    def _kit(self, site: Site) -> None:
        if site.kit is None:
            return
        from pfedsam.deployment.rehearsal import SERVER
        from pfedsam.deployment.site_check import check_kit

        for finding in check_kit(site.kit):
            if finding.name == SERVER:
                self.reachable = finding.message
            else:
                self._add(finding)

    def _terms(self, site: Site, terms: Terms) -> None:
        from pfedsam.deployment.rehearsal import CODE
        from pfedsam.deployment.rehearsal_terms import check_terms

        denied = any(finding.name == CODE and finding.fine for finding in self.findings)
        for finding in check_terms(terms, site.settings, site.allowed_classes(), denied):
            self._add(finding)

    def _data(self, report: Any) -> None:
        from pfedsam.data.check_report import print_report

        if not report.ok:
            print_report(report, console)
            codes = ", ".join(sorted({str(finding.code) for finding in report.errors}))
            self._tell("data check", f"{len(report.errors)} error(s): {codes}, see above", fine=False)
            return
        sections = {name: sum(row.section == name for row in report.cases) for name in _SECTIONS}
        told = ", ".join(f"{count} {name}" for name, count in sections.items())
        others = len(report.findings)
        self._tell(
            "data check", f"{len(report.cases)} cases: {told}; {others} remark(s): `pfedsam validate` shows them"
        )

    def _round(self, ask: Any) -> Measured | None:
        from pfedsam.deployment.rehearsal_round import small_round

        try:
            with console.status("starting the small round") as status:
                measured = small_round(ask, lambda text: status.update(text))
        except PFedSAMError as error:
            # the sentence may name a case: it is printed, and its code alone is kept for the file
            self._tell("small round", f"{error.code}: {error.meaning}", fine=False)
            _say(f"  {error.message} {error.remedy}")
            return None
        for line in measured.loaded:
            self._tell("loaded", line)
        self._tell(
            "small round",
            f"{measured.cases} cases, {sum(measured.steps.values())} steps, device {measured.device}, "
            f"{measured.threads} thread(s); global Dice {measured.dice_global:.2f}"
            + ("" if measured.dice_personal is None else f", personal {measured.dice_personal:.2f}"),
        )
        self._tell("base weights", f"fingerprint {measured.fingerprint[:16]}: it must be the same at all sites")
        self._tell("personal state", f"{measured.state_bytes / 1e6:.2f} MB written, closed to others, read again")
        self._leaves(measured.leaves)
        return measured

    def _leaves(self, leaves: Leaving) -> None:
        self._tell("boundary", f"site's filter and server's guard took it; {leaves.stays} personal tensors stay")
        table = Table("would leave with each round", "tensors", "numbers", "bytes")
        for name, group in leaves.groups.items():
            table.add_row(name, str(group.tensors), f"{group.numbers:,}", f"{group.bytes:,}")
        for name, what in leaves.scalars.items():
            table.add_row(f"{name}: {what}", "", "1", "")
        console.print(table)
        done = f" after {', '.join(leaves.done)}" if leaves.done else ""
        _say(f"{leaves.bytes:,} bytes of tensors travel in a round{done}. After the last round a return code leaves.")

    def _needs(self, site: Site, terms: Terms, measured: Measured, ask: Any, seconds: float) -> Needs:
        from pfedsam.deployment.rehearsal import enough, needs

        needed = needs(measured, ask, terms, seconds)
        for finding in enough(site, needed):
            self._add(finding)
        _say(
            f"Estimates: start {needed.start_minutes:g} min, first round {needed.first_round_minutes:g} min, each "
            f"later one {needed.round_minutes:g} min, final phase {needed.final_minutes:g} min; a job of "
            f"{terms.rounds} rounds {needed.job_minutes:g} min, without waiting for the server and the others. "
            f"Features of more cases may take up to {needed.cache_gib:g} GB more."
        )
        return needed

    def _tell(self, name: str, message: str, fine: bool = True) -> None:
        from pfedsam.deployment.site_check import Finding

        self._add(Finding(name, fine, message))

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        mark = (
            "[bold red]WRONG[/]" if not finding.fine else "[yellow]NOTE [/]" if finding.warning else "[green]ok   [/]"
        )
        console.print(f"{mark} {finding.name}: ", end="", markup=True)
        _say(finding.message)


#: Without these there is nothing to train; other findings do not hinder a round of which nothing leaves.
_NEEDED = ("job: plan", "data check")
_SECTIONS = ("training", "validation", "test")


def _say(*lines: str, **how: Any) -> None:
    console.print(*lines, highlight=False, soft_wrap=True, **how)


def _meanings(labels: str | None) -> Any:
    try:
        return None if labels is None else json.loads(labels)
    except ValueError:
        raise typer.BadParameter(f'{labels!r} is no JSON, as {{"1": "disc"}}', param_hint="--labels") from None


def _write(
    out: Path,
    site: Site,
    terms: Terms,
    findings: Iterable[Finding],
    measured: Measured | None,
    needed: Needs | None,
    unknown: list[str],
) -> None:
    """Write the evidence: what was found, without names of cases."""
    from importlib.metadata import version

    from pfedsam.files import write_atomically

    told = {
        "site": site.name,
        "job": {"name": terms.job.name, "sha256": terms.digest, "federation": terms.plan.federation},
        "versions": {name: version(name) for name in ("pfedsam", "nvflare", "monai", "torch")},
        "findings": [asdict(finding) for finding in findings],
        "measured": measured and measured.model_dump(exclude={"loaded"}),
        "needs": needed and asdict(needed),
        "not_verified": unknown,
    }
    try:
        write_atomically(out, (json.dumps(told, indent=2) + "\n").encode())
    except OSError as error:
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{out} cannot be written: {error}.", "Give another --report.") from None
    _say(f"{out} written: it names no case.")
