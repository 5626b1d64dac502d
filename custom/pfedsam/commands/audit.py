"""`pfedsam audit`: for a hospital's privacy officer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam.commands.console import console
from pfedsam.commands.listing import OPERATE
from pfedsam.errors import ErrorCode, PFedSAMError

app = typer.Typer()


@app.command("audit", rich_help_panel=OPERATE)
def audit(
    workspace: Annotated[Path | None, typer.Argument(help="The site's startup kit folder.")] = None,
    job: Annotated[str, typer.Argument(help="Id of the job, or how it begins.")] = "",
    statement: Annotated[bool, typer.Option("--statement", help="Print the data-flow statement and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What left this site in a job: every result, its tensors and bytes, the filters, hashes of the configuration.

    Exit code 1 if the site's records and NVFlare's audit log do not fit together, or something left that may not.
    """
    from pfedsam.deployment import audit as rooms
    from pfedsam.federated.records import CHECKED, LEFT, SCALARS

    if statement:
        print(rooms.statement())
        return
    if workspace is None:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, "no workspace is given.", "pfedsam audit <startup kit> <job>, or --statement."
        )
    report = rooms.audit(workspace, job)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        raise typer.Exit(1 if report.problems else 0)
    _show(
        f"results of job {report.job} after the allow-list", report.stage(CHECKED), "by_group", "excluded", "metadata"
    )
    _show("what left this site, after all filters", report.stage(LEFT), "reply", "metadata")
    chains = {record["task"]: record["filters"] for record in report.stage(CHECKED) if "filters" in record}
    for task, chain in chains.items():
        console.print(f"filters of task {task}: {', then '.join(chain)}", highlight=False)
    for record in report.stage(SCALARS):
        tags = ", ".join(f"{tag} ({count})" for tag, count in sorted(record["tags"].items()))
        console.print(f"scalars for curves, beside the filters: {tags}", highlight=False)
    for file, digest in report.hashes.items():
        console.print(f"{digest[:16]}  {file}", highlight=False, soft_wrap=True)
    for action in report.actions:
        console.print(f"{action['user']}: {action['action']}", highlight=False)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="bold red", highlight=False)
    codes = sorted({record["reply"] for record in report.submitted} - {"OK"})
    fine = f"{len(report.stage(LEFT))} results by NVFlare's audit log, as many by the filter: they agree"
    console.print(fine if not report.problems else f"{len(report.problems)} problem(s)", highlight=False)
    if codes:
        console.print(f"tasks that ended with a code of NVFlare and no result: {', '.join(codes)}", highlight=False)
    raise typer.Exit(1 if report.problems else 0)


def _show(title: str, records: list[dict[str, Any]], *more: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    names = {"by_group": "groups", "excluded": "kept back"}
    columns = ("task", "round", "tensors", "bytes", *more)
    for column in ("time", *(names.get(key, key) for key in columns), "SHA-256"):
        table.add_column(column)
    for record in records:
        row = record | {"by_group": ", ".join(record.get("by_group", ())) or record["reply"]}
        row["metadata"] = ", ".join(record.get("metadata", ()))
        cells = (row.get(key) for key in columns)
        table.add_row(
            record["time"][11:19], *("" if v is None else str(v) for v in cells), record.get("sha256", "")[:12]
        )
    console.print(table)
