"""`pfedsam site`: for a hospital's IT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam.commands.console import console
from pfedsam.commands.rehearse import rehearse
from pfedsam.errors import ErrorCode, PFedSAMError

app = typer.Typer(
    name="site",
    help="A startup kit made ready for a hospital, and checked.",
    no_args_is_help=True,
)

Kit = Annotated[Path, typer.Argument(help="Folder of the startup kit, with startup/ and local/.")]


@app.command("init")
def init(
    kit: Kit,
    data_root: Annotated[Path | None, typer.Option(help="Site folder, or the folder that holds it.")] = None,
    state_root: Annotated[Path | None, typer.Option(help="Where the personal model is kept; back this up.")] = None,
    prepared_root: Annotated[
        Path | None,
        typer.Option(help="Keep prepared volumes here for the next job: pictures of patients, as the data are."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda:0 ...")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="SAM's base weights on this machine.")] = None,
    labels: Annotated[str | None, typer.Option(help='What label values mean: {"1": "disc", "2": "cup"}')] = None,
    federations: Annotated[str | None, typer.Option(help="Names that this site has agreed to, with commas.")] = None,
    may_share: Annotated[
        str | None, typer.Option(help="Parameter groups that this site is willing to share, with commas.")
    ] = None,
    may_tell: Annotated[
        str | None,
        typer.Option(help="Numbers that this site tells where a strategy asks for one: pfedsam_gap, or '' for none."),
    ] = None,
    largest_clip: Annotated[float | None, typer.Option(help="Jobs must clip to a norm of at most so much.")] = None,
    least_noise: Annotated[
        float | None, typer.Option(help="Jobs must add noise of at least so many times the clip.")
    ] = None,
    curves: Annotated[
        bool | None,
        typer.Option("--curves/--no-curves", help="Send losses, validation Dice and gate shares; off by default."),
    ] = None,
    least_validation_cases: Annotated[
        int | None, typer.Option(min=1, help="With fewer validation cases no Dice leaves the site; 5 by default.")
    ] = None,
    least_sites: Annotated[
        int | None,
        typer.Option(
            min=1, help="Take part with at least so many sites; 3 by default: of two, each knows the other's."
        ),
    ] = None,
    peers_see_my_model: Annotated[
        bool | None,
        typer.Option(
            "--peers-see-my-model/--no-peers-see-my-model",
            help="Other sites may be sent mixtures from which they can read this site's model; not by default.",
        ),
    ] = None,
    most_rounds: Annotated[
        int | None, typer.Option(min=1, help="Of a job at this site; 1000 where nothing was said before.")
    ] = None,
    most_epochs: Annotated[
        int | None, typer.Option(min=1, help="Of a round, and of the final phase; 100 where nothing was said before.")
    ] = None,
    most_hours: Annotated[
        float | None, typer.Option(help="That a job may take at this site; 168 where nothing was said before.")
    ] = None,
    byoc: Annotated[
        bool, typer.Option("--byoc", help="Let jobs carry code. No filter stops hostile code in the same process.")
    ] = False,
) -> None:
    """Make a startup kit ready: exact classes, our filter on every task, no code in jobs, no log streaming.

    Works on a site's kit and on the server's (which needs no data). Called again, it keeps what is not given, also what
    was added by hand, and says what it changes; a file that it changes is kept as <name>.before. Code in jobs is denied
    again unless --byoc is given.
    """
    from pfedsam.deployment.kits import init_kit, is_server
    from pfedsam.federated.settings import SITE_SETTINGS, SiteSettings, read_settings

    if not is_server(kit) and data_root is None and not read_settings(kit / "local" / SITE_SETTINGS).data_root:
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, "a site needs its data.", "Say where: --data-root.")
    options = {
        "data_root": data_root and str(data_root.resolve()),
        "state_root": state_root and str(state_root.resolve()),
        "prepared_root": prepared_root and str(prepared_root.resolve()),
        "device": device,
        "threads": threads,
        "checkpoint": checkpoint and str(checkpoint.resolve()),
        "labels": _labels(labels),
        "federations": _words(federations),
        "may_share": _words(may_share),
        "may_tell": _words(may_tell),
        "largest_clip": largest_clip,
        "least_noise": least_noise,
        "curves": curves,
        "least_validation_cases": least_validation_cases,
        "least_sites": least_sites,
        "peers_see_my_model": peers_see_my_model,
        "most_rounds": most_rounds,
        "most_epochs": most_epochs,
        "most_hours": most_hours,
    }
    given = {key: value for key, value in options.items() if value is not None}
    try:
        settings = SiteSettings.model_validate(given)
    except ValueError as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{error}".replace("\n", " "), "See `pfedsam site init --help`."
        ) from None
    for file in init_kit(kit, settings, byoc=byoc):
        said = "written" if file.changes is None else "changed" if file.changes else "as before"
        _say(f"{file.path}: {said}", *(file.changes or ()), sep="\n  ")
    _say(f"Next: pfedsam site check {kit}")


def _say(*lines: str, **how: Any) -> None:
    console.print(*lines, highlight=False, soft_wrap=True, **how)


def _words(text: str | None) -> list[str] | None:
    """The names in a list with commas."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _labels(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"--labels is no JSON: {error}.", 'For example: {"1": "disc"}'
        ) from None


app.command("rehearse")(rehearse)


@app.command("check")
def check(kit: Kit) -> None:
    """Look at policy, certificates, disk, memory, versions, network, data and state. Exit code 1 if one is wrong."""
    with console.status("looking"):
        from pfedsam.deployment.site_check import check_kit

        findings = list(check_kit(kit))
    for finding in findings:
        mark, style = ("ok   ", "green") if finding.fine else ("WRONG", "bold red")
        if finding.fine and finding.warning:
            mark, style = "NOTE ", "yellow"
        console.print(f"[{style}]{mark}[/] {finding.name}: ", end="", markup=True)
        _say(finding.message)
    raise typer.Exit(0 if all(finding.fine for finding in findings) else 1)


@app.command("renew")
def renew(
    kit: Kit,
    new: Annotated[
        Path,
        typer.Argument(exists=True, help="Kit with the new certificate (`nvflare package`), or a new rootCA.pem."),
    ],
) -> None:
    """Put a new certificate or root into a kit that is in use: settings and policy stay, files before are kept.

    Refused, and nothing is written, if it is somebody else's, ends no later, or does not fit.
    """
    from pfedsam.deployment.kit_renewal import renew_kit

    lines = renew_kit(kit, new)
    _say(*(lines or [f"{kit}: all as it was, the kit's own root lasts longer"]), sep="\n")
    if lines:
        _say(f"Start it again between two jobs, then: pfedsam site check {kit}")


@app.command("clean")
def clean(
    kit: Kit,
    older_than: Annotated[int, typer.Option(min=1, help="Days since something was last written in it.")] = 84,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the folders of finished jobs and rotated logs, which name cases. States and audit records stay.

    What left the site in a removed job is kept in <kit>/audit: `pfedsam audit <kit>/audit <job>`.
    """
    from pfedsam.deployment.retention import outdated, remove

    entries = outdated(kit, older_than)
    for entry in entries:
        _say(f"{entry.path}: {entry.days:.0f} days old, {entry.bytes / 1e6:.1f} MB")
    if not entries:
        _say(f"nothing in {kit} is older than {older_than} days")
        return
    if not yes:
        typer.confirm(f"Remove these {len(entries)} for good?", abort=True)
    for entry in entries:
        remove(kit, entry)
    _say(f"removed {len(entries)}")
