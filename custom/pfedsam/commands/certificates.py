"""`pfedsam certificates`: when the certificates of a federation end, and their renewal by the project administrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pfedsam.commands.console import console

app = typer.Typer(
    name="certificates", help="When a federation's certificates end, and their renewal.", no_args_is_help=True
)
Project = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="<workspace>/<project>, as `nvflare provision` made it.")
]


@app.command("show")
def show(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="A startup kit, or a project of `nvflare provision`.")
    ],
) -> None:
    """List certificates with their ends. Exit code 1 if one ends within 60 days."""
    from pfedsam.deployment.certificates import WARN_DAYS, of_kit, of_project

    found = of_kit(folder) if (folder / "startup").is_dir() else of_project(folder)
    table = Table("whose", "ends", "serial number")
    for one in found:
        table.add_row(one.name, one.words, f"{one.serial:x}"[:16], style="bold red" if one.days < WARN_DAYS else None)
    console.print(table)
    raise typer.Exit(int(any(one.days < WARN_DAYS for one in found)))


@app.command("renew")
def renew(
    project: Project,
    names: Annotated[
        list[str] | None, typer.Argument(help="Sites, servers or people; none: all whose certificate ends soon.")
    ] = None,
    within: Annotated[int, typer.Option(min=1, help="Days that count as soon.")] = 60,
    root: Annotated[
        bool, typer.Option("--root", help="The root, too: every kit is then replaced at one agreed time.")
    ] = False,
) -> None:
    """Let the next `nvflare provision` make new certificates and keys, which it does not do by itself.

    The root stays without --root, so all other kits go on working. The file before is kept beside it.
    """
    from pfedsam.deployment.certificates import renew as renew_certificates
    from pfedsam.deployment.certificates import state_file

    renewed = renew_certificates(project, names or (), within, root)
    for one in renewed:
        console.print(f"{one.name}: ends {one.words}; the next provisioning makes a new one", highlight=False)
    if not renewed:
        console.print(f"nothing in {project} ends within {within} days", highlight=False)
        return
    before = state_file(project).with_name("cert.json.before") if not root else None
    each = "replaces its startup/ and keeps its local/" if root else "calls `pfedsam site renew <kit> <new kit>`"
    console.print(
        "next: nvflare provision -p <project file> -w <workspace>, then hand out the new kits: each one "
        f"{each}, starts again and runs `pfedsam site check`",
        highlight=False,
        soft_wrap=True,
    )
    if before is not None:
        console.print(f"the file before: {before}, which holds private keys", highlight=False, soft_wrap=True)


Folder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="With rootCA.key; or <workspace>/<project> of `provision`.")
]


@app.command("authority")
def authority(project: Project, out: Annotated[Path, typer.Argument(help="Folder to write; keep it offline.")]) -> None:
    """Write the folder with which `nvflare cert approve` signs, for a federation that `nvflare provision` has made.

    From then on no private key of a site needs to be made by the project administrator.
    """
    from pfedsam.deployment.authority import PROFILE, fingerprint, make_authority

    root = make_authority(project, out)
    # rich would write an emoji for the bytes :AB: of a fingerprint
    how: dict[str, Any] = {"highlight": False, "soft_wrap": True, "emoji": False, "markup": False}
    console.print(f"{root.path}: ends {root.words}; fingerprint {fingerprint(root.path)}", **how)
    console.print(f"next: nvflare cert approve -c {out} --profile {out / PROFILE} <request zip>", **how)


@app.command("root")
def root_anew(
    folder: Folder,
    days: Annotated[int | None, typer.Option(min=1, help="That it is valid; as the one before, if not given.")] = None,
) -> None:
    """Make the root certificate anew with the same key: nobody stops, all other certificates stay good.

    It takes access away from nobody; `renew --root` does.
    """
    from pfedsam.deployment.authority import renew_root

    root = renew_root(folder, days)
    console.print(
        f"{root.path}: ends {root.words}; the file before is kept as .before", highlight=False, soft_wrap=True
    )
    console.print(
        "next: send rootCA.pem to all; each one, when it suits: pfedsam site renew <kit> rootCA.pem, and a restart",
        highlight=False,
        soft_wrap=True,
    )
