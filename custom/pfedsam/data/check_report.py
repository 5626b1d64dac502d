"""A site report for people: a table of the cases, and what was found."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pfedsam.data.site_report import Severity, SiteReport


def print_report(report: SiteReport, console: Console) -> None:
    """Print a table of the cases and the findings below it; an error is red and also says so."""
    table = Table(title=f"Site {report.folder}")
    for column in ("case", "section", "shape", "spacing mm", "axes", "type", "labels", "foreground", "empty", "range"):
        table.add_column(column, overflow="fold")
    for row in report.cases:
        table.add_row(
            row.name,
            row.section or "-",
            " x ".join(map(str, row.shape)) or "-",
            " x ".join(f"{step:.3g}" for step in row.spacing) if row.spacing else "-",
            row.orientation or "-",
            row.dtype or "-",
            " ".join(f"{value:g}" for value in row.label_values[:6]) or "-",
            str(row.foreground),
            "-" if row.empty_slices is None else f"{row.empty_slices:.0%}",
            f"{row.intensity[0]:.4g} .. {row.intensity[1]:.4g}" if row.intensity else "-",
        )
    console.print(table)
    colours: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    for finding in sorted(report.findings, key=lambda finding: list(colours).index(finding.severity)):
        head = f"[{colours[finding.severity]}]{finding.severity.upper()} {finding.code}[/]"
        console.print(
            f"{head} {escape(finding.message)} {escape(finding.remedy)}".rstrip(), soft_wrap=True, markup=True
        )
    counts = Counter(finding.severity for finding in report.findings)
    summary = ", ".join(f"{counts[severity]} {severity}(s)" for severity in colours)
    for line in report.loaded:
        console.print(f"loaded through the bundle: {line}", soft_wrap=True, highlight=False)
    verdict = "[bold red]NOT OK[/]: correct the errors first"
    if report.ok:
        # only what was loaded is known to train
        what = "the site can train" if report.loaded else "the files are in order; no case was loaded as in training"
        verdict = f"[green]OK[/]: {what}"
    console.print(f"{verdict} ({len(report.cases)} case(s), {summary}).", markup=True)
