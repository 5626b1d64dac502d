"""`pfedsam poc`: a federation of real processes with mutual TLS on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfedsam import defaults
from pfedsam.commands.console import Force, Fresh, Job, Overrides, console, literals, quiet_libraries, show_doubts
from pfedsam.commands.interrupts import command_again, ends_in_order
from pfedsam.commands.poc_results import News, show_proof, show_results
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ranges import MOST_ROUNDS
from pfedsam.storage.run_folder import move_aside

app = typer.Typer(
    name="poc",
    help="A federation of real processes with mutual TLS on this machine.",
    no_args_is_help=True,
)

FEDERATION = "poc"
ROUNDS = 2
#: A hospital's default is 3 (`pfedsam site init`): of two sites, each can compute the other's update.
LEAST_SITES = 2
#: As small as it can be: this shows that the deployment works, not how good the method is.
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "adapted_blocks": 1,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
    "cache_limit_gb": 1,
}
_CASES, _SHAPE = 4, (64, 64, 8)

Runtime = Annotated[Path, typer.Option("--runtime", help="Folder of everything that is generated.")]
Project = Annotated[Path, typer.Option(help="NVFlare project file.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Of the server; by default the project's.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder that holds the site folders, named as the sites; by default a phantom.")
]
RUNTIME, PROJECT = Path("poc_workspace/.runtime"), Path("poc_workspace/project.yml")


@app.command("run")
def run(
    runtime: Runtime = RUNTIME,
    project: Project = PROJECT,
    port: Port = None,
    data: Data = None,
    job: Job = defaults.STRATEGY,
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS)] = ROUNDS,
    fresh: Fresh = False,
    force: Force = False,
    set_: Overrides = None,
) -> None:
    """Everything from provisioning to the table, and what it has proved.

    In the end, also after Ctrl-C or an error, nothing is left running.
    """
    settings = _settings(set_, data is None)
    _check(job, settings)
    with ends_in_order(f"To start again: {command_again()}"):
        deployment = _deployment(runtime, project, port)
        deployment.require_free_port()
        _claim(deployment, force)
        sites = _site_folders(deployment, data)
        _require_same_job(deployment, job, settings, sites, fresh)
        try:
            _up(deployment, sites)
            _submit(deployment, job, rounds, settings, sites)
        finally:
            _down(deployment)
        show_results(deployment, FEDERATION, sites, job, settings)
        show_proof(deployment)


@app.command("up")
def up(
    runtime: Runtime = RUNTIME, project: Project = PROJECT, port: Port = None, data: Data = None, force: Force = False
) -> None:
    """Provision the project, write each site's policy, start server and sites."""
    with ends_in_order(f"To start again: {command_again()}"):
        deployment = _deployment(runtime, project, port)
        _claim(deployment, force)
        _up(deployment, _site_folders(deployment, data))
    console.print("Next: pfedsam poc submit; in the end: pfedsam poc down")


@app.command("submit")
def submit(
    runtime: Runtime = RUNTIME,
    job: Job = defaults.STRATEGY,
    rounds: Annotated[int, typer.Option(min=1, max=MOST_ROUNDS)] = ROUNDS,
    fresh: Fresh = False,
    set_: Overrides = None,
) -> None:
    """Submit a job to the running deployment, follow it, fetch its result."""
    _check(job, _settings(set_, (runtime / "phantom").is_dir()))
    deployment = _deployment(runtime, runtime / "project.yml", None)
    sites = deployment.data()
    phantom = any((runtime / "phantom").resolve() in folder.parents for folder in sites.values())
    settings = _settings(set_, phantom)
    _require_same_job(deployment, job, settings, sites, fresh)
    _submit(deployment, job, rounds, settings, sites)


@app.command("status")
def status(runtime: Runtime = RUNTIME) -> None:
    """What runs, and the state of each site."""
    from pfedsam.storage.state_list import list_states

    deployment = _deployment(runtime, runtime / "project.yml", None)
    for name in (deployment.server, *deployment.sites):
        running = [process.pid for process in deployment.processes(name)]
        state = f"running {running}" if running else "not running"
        console.print(f"{name}: {state}; log: {deployment.log(name)}", soft_wrap=True)
    for site in deployment.sites:
        for entry in list_states(deployment.state_root(site)):
            summary = f"state of federation '{entry.federation}', round {entry.info.get('round')}"
            console.print(f"{site}: {summary}{entry.problem and f'; {entry.problem}'}", soft_wrap=True)


@app.command("down")
def down(runtime: Runtime = RUNTIME) -> None:
    """Stop everything that was started here. States and logs stay."""
    _down(_deployment(runtime, runtime / "project.yml", None))


def _deployment(runtime: Path, project: Path, port: int | None) -> Any:
    with console.status("loading libraries"):
        quiet_libraries()
        from pfedsam.deployment.processes import Deployment
    if not project.is_file():
        raise PFedSAMError(
            ErrorCode.DEPLOYMENT, f"there is no {project}.", "Start with `pfedsam poc up` in the project's folder."
        )
    return Deployment(runtime, project, port)


def _claim(deployment: Any, force: bool) -> None:
    if deployment.claim(force):
        console.print(f"{deployment.root} was made by an earlier version; it is marked as ours now", soft_wrap=True)


def _up(deployment: Any, sites: dict[str, Path]) -> None:
    from pfedsam.deployment.admin import connect

    deployment.stop()
    deployment.require_free_port()
    with console.status("provisioning"):
        deployment.provision()
        deployment.init(sites, {"federations": [FEDERATION], "least_sites": LEAST_SITES})
    console.print(f"startup kits: {deployment.kit(deployment.server).parent}", highlight=False, soft_wrap=True)
    try:
        with console.status(f"starting {deployment.server} and {', '.join(deployment.sites)}"):
            deployment.start()
            with connect(deployment.admin()) as session:
                deployment.wait(session)
    except BaseException:
        _down(deployment)
        raise
    console.print(f"running: server on port {deployment.port}, {len(deployment.sites)} sites, mutual TLS")


def _site_folders(deployment: Any, data: Path | None) -> dict[str, Path]:
    if data is not None:
        return {site: data / site for site in deployment.sites}
    from pfedsam.commands.data import make_phantom

    folder = deployment.root / "phantom"
    count = max(2, len(deployment.sites))
    made = sorted(folder.glob("site-*")) or make_phantom(folder, count, _CASES, _SHAPE, 0)
    return dict(zip(deployment.sites, made, strict=False))


def _settings(set_: list[str] | None, phantom: bool) -> dict[str, Any]:
    return {**(SETTINGS if phantom else {}), **literals(set_ or [])}


def _check(job: str, overrides: dict[str, Any]) -> None:
    """Refuse wrong settings before anything is provisioned or started."""
    from pfedsam.bundles import require_settings
    from pfedsam.deployment.job_files import find_job, plan_settings

    require_settings(plan_settings(find_job(job))["bundle"], overrides)


def _terms(deployment: Any, job: str, settings: dict[str, Any], sites: dict[str, Path]) -> dict[str, Any]:
    """What decides the result of a job here."""
    from pfedsam.deployment.job_files import find_job, plan_settings
    from pfedsam.deployment.job_terms import job_terms
    from pfedsam.deployment.run_terms import kept_terms, terms_of, with_data

    folder = find_job(job)
    plan = {**plan_settings(folder), "federation": FEDERATION, "overrides": settings}
    return with_data(terms_of(plan, job_terms(folder)), sites, kept_terms(deployment.root))


def _require_same_job(deployment: Any, job: str, settings: dict[str, Any], sites: dict[str, Path], fresh: bool) -> None:
    """Let a job only go on from the states of an earlier one if all but the rounds is the same, and say so."""
    from pfedsam.deployment.run_terms import kept_terms, require_same
    from pfedsam.storage.state_list import list_states

    if fresh and (aside := move_aside(deployment.root)):
        console.print(f"states and results of earlier jobs are now in {aside}", highlight=False, soft_wrap=True)
    with console.status("reading settings and data"):
        if not any(list_states(deployment.state_root(site)) for site in deployment.sites):
            return
        remedy = "Give another --runtime, or --fresh, which moves those states aside."
        now = _terms(deployment, job, settings, sites)["terms"]
        require_same(f"the job whose states are in {deployment.root}", kept_terms(deployment.root), now, remedy)
    console.print("the sites go on from their states of an earlier job with the same settings and data; not: --fresh")


def _submit(deployment: Any, job: str, rounds: int, settings: dict[str, Any], sites: dict[str, Path]) -> None:
    from pfedsam.deployment.admin import connect, fetch, follow, submit
    from pfedsam.deployment.job_files import find_job
    from pfedsam.deployment.jobs import export_job
    from pfedsam.deployment.run_terms import keep_terms
    from pfedsam.federated.records import RECEIVED_FILE

    keep_terms(deployment.root, _terms(deployment, job, settings, sites))
    folder = export_job(
        find_job(job),
        deployment.root / "job",
        locked=True,
        plan={"federation": FEDERATION, "overrides": settings},
        server={"num_rounds": rounds, "min_clients": len(deployment.sites)},
        force=True,
    )
    with connect(deployment.admin()) as session:
        job_id = submit(session, folder)
        console.print(f"submitted, without code: job {job_id}", highlight=False)
        with console.status("training") as shown:
            news = News(deployment, job_id, shown.update)
            result = follow(session, job_id, shown.update, look=news)
        download = fetch(session, job_id, deployment.root / "results")
    if (received := download.file(RECEIVED_FILE)) is not None:
        show_doubts([received.parent])
    if not result.completed:
        raise PFedSAMError(
            ErrorCode.DEPLOYMENT, f"the job ended as {result.status}: {download.problem()}.", f"See {download.folder}."
        )
    model = download.file("global_model.safetensors")
    console.print(f"{result.status}; global model: {model}", highlight=False, soft_wrap=True)


def _down(deployment: Any) -> None:
    with console.status("stopping"):
        left = deployment.stop()
    console.print("nothing is left running" if not left else f"still running: {left}", highlight=False)
