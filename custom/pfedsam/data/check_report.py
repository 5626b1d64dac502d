"""A site report for people: a table of the cases, and what was found."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pfedsam.data.site_report import CaseRow, Finding, Severity, SiteReport
from pfedsam.errors import few

#: In their order: what hinders training comes first.
_COLOURS: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}
#: Columns of the table. Where it is too wide it becomes two, of the file and of its content.
_OF_FILE = ("case", "section", "shape", "spacing mm", "axes", "type")
_OF_CONTENT = ("labels", "foreground", "unknown", "empty", "range")
#: They have a column also where all cases have one value.
_ALWAYS = ("case", "section", "foreground")
#: Files, cases and numbers in a sentence: findings that differ in nothing else are told in one line.
_NAMED = re.compile(r"'[^']*'")
#: From so many such findings on.
_MANY = 3
#: Characters of a case's name that are kept on one line.
_LONGEST_NAME = 32
_ANY_WIDTH = 10_000


def print_report(report: SiteReport, console: Console) -> None:
    """Print a table of the cases and the findings below it; an error is red and also says so."""
    rows = [_cells(row) for row in report.cases]
    alike = _alike(rows)
    for table in _tables(f"Site {report.folder}", rows, alike, console):
        console.print(table)
    told = ", ".join(f"{column} {value}" for column, value in alike.items() if value != "-")
    if told:
        console.print(f"in all cases: {told}", soft_wrap=True, highlight=False)
    for finding, others in _grouped(report.findings):
        head = f"[{_COLOURS[finding.severity]}]{finding.severity.upper()} {finding.code}[/]"
        text = f"{finding.message} {finding.remedy}".rstrip()
        if others:
            # of an error each case has to be found; the others are told by a few
            names = ", ".join(others) if finding.severity == "error" else few(others)
            text += f" The same for {len(others)} more: {names}."
        console.print(f"{head} {escape(text)}", soft_wrap=True, markup=True, highlight=False)
    counts = Counter(finding.severity for finding in report.findings)
    summary = ", ".join(f"{counts[severity]} {severity}(s)" for severity in _COLOURS)
    for line in report.loaded:
        console.print(f"loaded through the bundle: {line}", soft_wrap=True, highlight=False)
    verdict = "[bold red]NOT OK[/]: correct the errors first"
    if report.ok:
        # only what was loaded is known to train
        what = "the site can train" if report.loaded else "the files are in order; no case was loaded as in training"
        verdict = f"[green]OK[/]: {what}"
    console.print(f"{verdict} ({len(report.cases)} case(s), {summary}).", markup=True, soft_wrap=True)


def _cells(row: CaseRow) -> dict[str, str]:
    """What the table says of a case, by column."""
    return {
        "case": row.name,
        "section": row.section or "-",
        "shape": "x".join(map(str, row.shape)) or "-",
        "spacing mm": "x".join(f"{step:.3g}" for step in row.spacing) if row.spacing else "-",
        "axes": row.orientation or "-",
        "type": row.dtype or "-",
        "labels": " ".join(f"{value:g}" for value in row.label_values[:6]) or "-",
        "foreground": str(row.foreground),
        "unknown": f"{row.unknown:.0%}" if row.unknown else "-",
        "empty": "-" if row.empty_slices is None else f"{row.empty_slices:.0%}",
        "range": f"{row.intensity[0]:.4g} .. {row.intensity[1]:.4g}" if row.intensity else "-",
    }


def _alike(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """The columns in which all of several cases have one value, with that value."""
    if len(rows) < 2:
        return {}
    columns = [column for column in (*_OF_FILE, *_OF_CONTENT) if column not in _ALWAYS]
    return {column: rows[0][column] for column in columns if len({row[column] for row in rows}) == 1}


def _tables(title: str, rows: Sequence[dict[str, str]], alike: dict[str, str], console: Console) -> list[Table]:
    """One table, or two where one is wider than the console."""
    file, content = ([c for c in part if c not in alike] for part in (_OF_FILE, _OF_CONTENT))
    whole = _table(title, rows, [*file, *content])
    # within the console's own options no table would be wider than it
    if Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), whole).minimum <= console.width:
        return [whole]
    return [_table(title, rows, file), _table("", rows, ["case", *content])]


def _table(title: str, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> Table:
    table = Table(title=title or None, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    longest = max((len(row["case"]) for row in rows), default=0)
    for column in columns:
        # the name of a case may be longer than a line; all else is kept whole
        least = min(longest, _LONGEST_NAME) if column == "case" else len(column)
        table.add_column(column, overflow="fold", no_wrap=column != "case", min_width=least)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table


def _grouped(findings: Sequence[Finding]) -> list[tuple[Finding, list[str]]]:
    """The findings by their severity: the first of those that say the same, and the cases of the others."""
    groups: dict[tuple[str, ...], list[Finding]] = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: list(_COLOURS).index(finding.severity)):
        said = _NAMED.sub("'...'", finding.message)
        groups[finding.severity, finding.code, said, finding.remedy].append(finding)
    told: list[tuple[Finding, list[str]]] = []
    for group in groups.values():
        names = [finding.case for finding in group]
        if len(group) >= _MANY and all(names):
            told.append((group[0], names[1:]))
        else:
            told += [(finding, []) for finding in group]
    return told
