"""`pfedsam site` and `pfedsam audit`: for a hospital's IT and its privacy officer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pfedsam.commands.console import OPERATE, console
from pfedsam.errors import PFedSAMError

app = typer.Typer(help="A startup kit made ready for a hospital, and checked.", no_args_is_help=True)
audit_app = typer.Typer()

Kit = Annotated[Path, typer.Argument(help="Folder of the startup kit, with startup/ and local/.")]


@app.command("init")
def init(
    kit: Kit,
    data_root: Annotated[Path | None, typer.Option(help="Site folder, or the folder that holds it.")] = None,
    state_root: Annotated[Path | None, typer.Option(help="Where the personal model is kept; back this up.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0 ...")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="SAM's base weights on this machine.")] = None,
    labels: Annotated[str | None, typer.Option(help='What label values mean: {"1": "disc", "2": "cup"}')] = None,
    federations: Annotated[str | None, typer.Option(help="Names that this site has agreed to, with commas.")] = None,
    byoc: Annotated[
        bool, typer.Option("--byoc", help="Let jobs carry code. No filter stops hostile code in the same process.")
    ] = False,
) -> None:
    """Make a startup kit ready: exact classes, our filter on every task, no code in jobs, no log streaming.

    Works on a site's kit and on the server's (which needs no data). Files that were there are kept as <name>.before.
    """
    from pfedsam.federated.kits import init_kit, is_server
    from pfedsam.federated.settings import SiteSettings

    if not is_server(kit) and data_root is None:
        raise PFedSAMError("E01", "a site needs its data.", "Say where: --data-root.")
    told = {
        "data_root": data_root and str(data_root.resolve()),
        "state_root": state_root and str(state_root.resolve()),
        "device": device,
        "checkpoint": checkpoint and str(checkpoint.resolve()),
        "labels": json.loads(labels) if labels else None,
        "federations": [one.strip() for one in federations.split(",")] if federations else None,
    }
    for path in init_kit(kit, SiteSettings.model_validate(told), byoc=byoc):
        console.print(f"{path}", highlight=False)
    console.print(f"Next: pfedsam site check {kit}", highlight=False)


@app.command("check")
def check(kit: Kit) -> None:
    """Look at policy, certificates, disk, memory, versions, network, data and state. Exit code 1 if one is wrong."""
    with console.status("looking"):
        from pfedsam.federated.kits import check_kit

        findings = list(check_kit(kit))
    for one in findings:
        mark, style = ("ok   ", "green") if one.fine else ("WRONG", "bold red")
        console.print(f"[{style}]{mark}[/] {one.name}: ", end="")
        console.print(one.message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(one.fine for one in findings) else 1)


@audit_app.command("audit", rich_help_panel=OPERATE)
def audit(
    workspace: Annotated[Path | None, typer.Argument(help="The site's startup kit folder.")] = None,
    job: Annotated[str, typer.Argument(help="Id of the job, or how it begins.")] = "",
    statement: Annotated[bool, typer.Option("--statement", help="Print the data-flow statement and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What left this site in a job: every result, its tensors and bytes, the filters, hashes of the configuration.

    Exit code 1 if the site's records and NVFlare's audit log do not fit together, or something left that may not.
    """
    from rich.table import Table

    from pfedsam.federated import audit as rooms

    if statement:
        print(rooms.statement())
        return
    if workspace is None:
        raise PFedSAMError("E01", "no workspace is given.", "pfedsam audit <startup kit> <job>, or --statement.")
    found = rooms.audit(workspace, job)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        raise typer.Exit(1 if found.problems else 0)
    table = Table(title=f"what left this site in job {found.job}")
    for column in ("time", "task", "round", "tensors", "bytes", "groups", "kept back", "SHA-256"):
        table.add_column(column)
    for one in found.results:
        groups = ", ".join(one.get("by_group", {})) or one.get("reply", "")
        numbers = (str(one.get(key, "") if one.get(key) is not None else "") for key in ("round", "tensors", "bytes"))
        kept, digest = str(one.get("excluded", "")), str(one.get("sha256", ""))[:12]
        table.add_row(str(one["time"])[11:19], str(one["task"]), *numbers, groups, kept, digest)
    console.print(table)
    for file, digest in found.hashes.items():
        console.print(f"{digest[:16]}  {file}", highlight=False, soft_wrap=True)
    for action in found.actions:
        console.print(f"{action['user']}: {action['action']}", highlight=False)
    for problem in found.problems:
        console.print(f"problem: {problem}", style="bold red", highlight=False)
    fine = f"{len(found.submitted)} results by NVFlare's audit log, as many by the filter: they agree"
    console.print(fine if not found.problems else f"{len(found.problems)} problem(s)", highlight=False)
    raise typer.Exit(1 if found.problems else 0)
