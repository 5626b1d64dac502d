"""`pfedsam job`: NVFlare jobs as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import Admin, Force, Job, Overrides, console, literals, show_doubts
from pfedsam.commands.job_options import agreed, changed_strategy, given
from pfedsam.commands.job_watch import watch_job
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ranges import MOST_ROUNDS, MOST_SECONDS, MOST_SITES

app = typer.Typer(name="job", help="NVFlare jobs.", no_args_is_help=True)
app.command("watch")(watch_job)


@app.command("export")
def job_export(
    job: Annotated[str, typer.Argument(help="Name of a packaged job, or a job folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    locked: Annotated[bool, typer.Option("--locked", help="Without app/custom: sites must allow its classes.")] = False,
    byoc: Annotated[
        bool, typer.Option("--byoc", help="With our code in app/custom: for sites that allow code and lack ours.")
    ] = False,
    federation: Annotated[str | None, typer.Option(help="Name of the federation.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Strategy, ablation or .json file in the place of the job's (`pfedsam compare --list`)."),
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="Name of an installed bundle; by default the job's.")] = None,
    set_: Overrides = None,
    theta0: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="First global model (`pfedsam init-global`); the job carries it, for a server without weights.",
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=MOST_ROUNDS)] = None,
    min_clients: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_SITES, help="Sites without which the job does not start, no round counts and it stops."
        ),
    ] = None,
    least_sites: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SITES,
            help="Promise to the sites: no round of fewer. By default --min-clients, at most 3.",
        ),
    ] = None,
    wait: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_SECONDS,
            help="Seconds that a round waits for the other sites after --min-clients: the longest local round.",
        ),
    ] = None,
    missing_sites: Annotated[
        str | None,
        typer.Option(
            help="If a site is missing in a round: warn (name it, go on; the default) or fail (stop the job)."
        ),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Clip each site's update to this L2 norm.")] = None,
    noise: Annotated[float, typer.Option(help="Gaussian noise, as a multiple of --clip; epsilon is printed.")] = 0.0,
    precision: Annotated[str, typer.Option(help="Of the payload: fp32, fp16 or int8 (with error feedback).")] = "fp32",
    aggregation: Annotated[
        str | None,
        typer.Option(
            help="norm_clipped, mean, trimmed_mean, median, krum, svd or alternate; by default the strategy's."
        ),
    ] = None,
    most_cases: Annotated[
        list[str] | None,
        typer.Option(
            help="Agreed most training cases that a site counts as: a number for all, or site=number; repeat."
        ),
    ] = None,
    tracker: Annotated[
        str | None,
        typer.Option(help="Of the server, for curves: tensorboard (the default), mlflow or mlflow=http://host:port."),
    ] = None,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="CKKS: the server adds up what it cannot read; kits need a context.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a job folder that can be submitted as it is.

    An exported job that is as it was written is replaced. One that somebody has changed, or made by hand, is replaced
    with --force only; a folder that is no job, never.
    """
    from pfedsam.deployment.job_files import find_job, plan_settings, server_settings
    from pfedsam.deployment.job_privacy import Privacy
    from pfedsam.deployment.jobs import export_job

    if noise and clip is None:
        raise typer.BadParameter("noise needs --clip: it is a multiple of it", param_hint="--noise")
    if precision not in ("fp32", "fp16", "int8"):
        raise typer.BadParameter(f"'{precision}' is not fp32, fp16 or int8", param_hint="--precision")
    source = find_job(job)
    # the plan promises to the sites what the server waits for
    server = {"num_rounds": rounds, "min_clients": min_clients or server_settings(source)["min_clients"]}
    told: dict[str, Any] = {
        "federation": federation,
        "bundle": bundle,
        "least_sites": least_sites,
        "missing_sites": missing_sites,
        "most_cases": agreed(most_cases) if most_cases else None,
    }
    changed, name = changed_strategy(plan_settings(source), strategy, aggregation, literals(set_ or []))
    export_job(
        source,
        out,
        locked=locked,
        byoc=byoc,
        plan={**given(told), **changed},
        server=given(server),
        theta0=theta0,
        wait=wait,
        tracker=tracker,
        privacy=Privacy(clip, noise, precision, encrypt),
        name=name,
        force=force,
    )
    console.print(f"{out} written" + (", locked: it carries no code" if locked else ", with our code" if byoc else ""))
    if encrypt:
        note = "encrypted: the plain mean is taken; length and direction of an update cannot be checked"
        console.print(note, highlight=False, soft_wrap=True)
    if noise:
        from pfedsam.federated.privacy import DELTA, epsilon

        count = int(server_settings(out)["num_rounds"])
        value = epsilon(noise, count)
        console.print(
            f"one site's updates over {count} rounds: epsilon {value:.1f} at delta {DELTA:g}"
            + (" - so large an epsilon guarantees little" if value > 10 else "")
        )


@app.command("submit")
def job_submit(
    job: Annotated[Path, typer.Argument(help="Job folder, see `pfedsam job export --locked`.")],
    admin: Admin,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("runs/jobs"),
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it and fetch its result.")] = True,
) -> None:
    """Submit a job as an administrator, follow it, fetch its result."""
    with console.status("connecting"):
        from pfedsam.deployment.admin import connect, submit

    with connect(admin) as session:
        _compare_versions(session)
        _until_done(session, submit(session, job), out, wait)


@app.command("resume")
def job_resume(
    job: Annotated[Path, typer.Argument(help="The job folder as it was submitted.")],
    admin: Admin,
    global_model: Annotated[
        Path, typer.Option(help="Its last global_model.safetensors, in <server's kit>/<job id>/app_server.")
    ],
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS, help="Of the whole federation.")],
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = Path("runs/jobs"),
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it and fetch its result.")] = True,
) -> None:
    """Go on after the server was lost: from the last global round, each site from its own personal state.

    The global model travels in the job, beside the configuration: a job that carries it is still one without code.
    """
    with console.status("connecting"):
        from pfedsam.deployment.admin import connect, resume

    with connect(admin) as session:
        _compare_versions(session)
        _until_done(session, resume(session, job, global_model, rounds), out, wait)


def _compare_versions(session: Any) -> None:
    """NVFlare's, here; pFedSAM's is compared at each site when the job starts."""
    from pfedsam.deployment.site_versions import require_same_nvflare

    with console.status("comparing versions"):
        versions = require_same_nvflare(session)
    if versions:
        sites = len(versions) - ("server" in versions)
        console.print(f"NVFlare {', '.join(sorted(set(versions.values())))}: the server and {sites} site(s)")


def _until_done(session: Any, job_id: str, out: Path, wait: bool) -> None:
    from pfedsam.deployment.admin import fetch, follow
    from pfedsam.federated.records import RECEIVED_FILE, SITES_FILE
    from pfedsam.federated.rounds import attendance

    console.print(f"job {job_id}", highlight=False)
    if not wait:
        return
    with console.status("waiting") as shown:
        follow(session, job_id, shown.update)
        result = fetch(session, job_id, out)
    console.print(f"{result.status}; result: {result.folder}", highlight=False, soft_wrap=True)
    if (sites := result.file(SITES_FILE)) is not None:
        console.print(f"took part: {attendance([sites.parent])}", highlight=False, soft_wrap=True)
    if (received := result.file(RECEIVED_FILE)) is not None:
        show_doubts([received.parent])
    if not result.completed:
        raise PFedSAMError(
            ErrorCode.DEPLOYMENT, f"the job ended as {result.status}: {result.problem()}.", f"See {result.folder}."
        )


@app.command("close")
def job_close(
    kit: Annotated[Path, typer.Option(help="Startup kit of the server, on this machine.")],
    jobs: Annotated[list[str] | None, typer.Argument(metavar="JOB", help="Ids of lost jobs.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every lost job; it is no error if there is none.")] = False,
) -> None:
    """Close jobs that a lost server has left RUNNING, which NVFlare's console can neither abort nor delete.

    A job that the server still runs is not touched. What the job has left can be downloaded afterwards.
    """
    from pfedsam.deployment.lost_jobs import CLOSED, close_jobs

    if bool(jobs) == every:
        raise typer.BadParameter("name jobs, or give --all", param_hint="JOB")
    closed = close_jobs(kit, jobs or None)
    for job in closed:
        model = job.global_model()
        left = f"its last global model, of round {model[1]}: {model[0]}" if model else "it has left no global model"
        console.print(f"{job.job_id} {job.name}: {CLOSED}; {left}", highlight=False, soft_wrap=True)
    if not closed:
        console.print("no job is lost")
    elif any(job.global_model() for job in closed):
        console.print("next: pfedsam job resume", highlight=False)


@app.command("make")
def job_make(
    strategy: Annotated[str, typer.Argument(help="Name of a strategy (`pfedsam compare --list`), or its .json file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    force: Force = False,
) -> None:
    """Write the job of a strategy: roles and phases from its file, everything else as in the job `pfedsam`.

    What is replaced is as with `export`.
    """
    from pfedsam.deployment.jobs import make_job

    console.print(f"{make_job(strategy, out, force=force)} written; next: pfedsam simulate <data> --job {out}")


@app.command("allow")
def job_allow(
    workspace: Annotated[Path, typer.Argument(help="Startup kit of a site or a server.")],
    job: Job = defaults.STRATEGY,
    simulator: Annotated[
        bool, typer.Option("--simulator", help="WORKSPACE is that of `nvflare simulator`; it is made if need be.")
    ] = False,
) -> None:
    """Allow the classes of a locked job at a site: adds them to <workspace>/local/resources.json."""
    from pfedsam.deployment.allowed_classes import allow_classes, require_workspace
    from pfedsam.deployment.job_files import find_job

    source = find_job(job)
    if not simulator:
        require_workspace(workspace)
    path, added = allow_classes(source, workspace)
    told = f"{len(added)} classes added" if added else "all classes of the job were allowed before"
    console.print(f"{path}: {told}", *added, sep="\n  ", highlight=False, soft_wrap=True)
