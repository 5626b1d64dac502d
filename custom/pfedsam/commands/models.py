"""`pfedsam models`, `describe` and `init-global`: base weights and networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pfedsam import defaults
from pfedsam.commands.console import Force, Job, Overrides, bar, console, literals
from pfedsam.commands.listing import DATA, LOOK, OPERATE
from pfedsam.ownership import require_free

app = typer.Typer()
models_app = typer.Typer(help="Base weights: what there is, with sizes and licences, and where it is.")
app.add_typer(models_app, name="models", rich_help_panel=DATA)


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List the published base weights, and which of them are on this machine."""
    if context.invoked_subcommand is not None:
        return
    from pfedsam.networks.weights import CHECKPOINTS, file_of, weights_folder

    table = Table(title="base weights")
    for column in ("name", "backbone", "size", "licence", "here", "from"):
        table.add_column(column, overflow="fold")
    for name, checkpoint in CHECKPOINTS.items():
        size = "" if checkpoint.bytes is None else f"{checkpoint.bytes / 1e6:.0f} MB"
        here = "yes" if file_of(name).is_file() else "no"
        table.add_row(name, checkpoint.backbone, size, checkpoint.licence, here, checkpoint.page)
    console.print(table)
    console.print(f"folder: {weights_folder()} (or $PFEDSAM_WEIGHTS)", highlight=False, soft_wrap=True)
    console.print("Get one: pfedsam models download NAME    A file of your own: export PFEDSAM_CHECKPOINT=<path>")
    console.print("Settings that use them: --set backbone=vit_b, --set checkpoint=medsam_vit_b")


@models_app.command("download")
def models_download(
    name: Annotated[str, typer.Argument(help="A name of `pfedsam models`.")],
    url: Annotated[str | None, typer.Option(help="Address of a mirror (https).")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder to put it in; by default $PFEDSAM_WEIGHTS.")] = None,
) -> None:
    """Download base weights; a download that was stopped goes on. The file is checked before it counts."""
    from pfedsam.networks.download import download
    from pfedsam.networks.weights import get_checkpoint

    checkpoint = get_checkpoint(name)
    with bar(f"downloading {checkpoint.filename} (bytes)", checkpoint.bytes or 1) as advance:
        path = download(checkpoint, folder, url=url, progress=advance.total)
    console.print(f"{path} is there and its checksum is right", highlight=False, soft_wrap=True)


@app.command("describe", rich_help_panel=LOOK)
def describe_bundle(
    bundle: Annotated[str, typer.Argument(help="Name of an installed bundle.")] = defaults.BUNDLE,
    job: Job = defaults.STRATEGY,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show the effective network of BUNDLE under a job's strategy: settings, parameters, bytes on the wire, cost."""
    given = literals(set_ or [])
    with console.status("building the network"):
        from pfedsam.bundle_tools.describe import describe
        from pfedsam.deployment.job_files import find_job, plan_settings
        from pfedsam.training.strategy import Strategy

        plan = plan_settings(find_job(job))
        strategy = Strategy.of(plan["strategy"])
        overrides = {**(plan.get("overrides") or {}), **given}
        description = describe(bundle, strategy.roles, overrides, copies=strategy.has_copy)
    if as_json:
        print(json.dumps({**description.to_dict(), "strategy": strategy.model_dump()}, indent=2))
        return
    _print_groups(bundle, description)
    settings = Table("setting", "value", title="network and data (change with --set, see pfedsam settings)")
    for key, value in description.settings.items():
        settings.add_row(key, str(value))
    settings.add_row("decoder share", f"{description.decoder_share} (from the strategy's groups and decoder_rank)")
    console.print(settings)
    _print_phases(strategy)


@app.command("init-global", rich_help_panel=OPERATE)
def init_global(
    out: Annotated[Path, typer.Argument(help="File to write (safetensors).")],
    job: Job = defaults.STRATEGY,
    set_: Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(envvar="PFEDSAM_CHECKPOINT", help="Path of the base weights; by default the bundle's.")
    ] = None,
    force: Force = False,
) -> None:
    """Write theta_0, the first global model, for a server without SAM weights (`pfedsam job export --theta0`)."""
    given = literals(set_ or [])
    require_free(out, force)
    with console.status("building the network"):
        from pfedsam.bundles import network_of
        from pfedsam.deployment.job_files import find_job, plan_settings
        from pfedsam.parameters import manifest, shared_state
        from pfedsam.storage.global_model import write_global_model
        from pfedsam.training.strategy import Strategy

        plan = plan_settings(find_job(job))
        roles = Strategy.of(plan["strategy"]).roles
        overrides = {**(plan.get("overrides") or {}), **given}
        network = network_of(plan["bundle"], overrides, checkpoint=checkpoint)
        state = shared_state(network, roles)
        about = {"bundle": plan["bundle"], "overrides": overrides}
        write_global_model(out, state, network.base_fingerprint, manifest(network, roles, "shared"), about=about)
    console.print(
        f"{out}: {len(state)} shared tensors, {out.stat().st_size / 1e6:.2f} MB, base {network.base_fingerprint[:12]}"
    )


def _print_groups(bundle: str, description: Any) -> None:
    table = Table("group", "role", "tensors", "parameters", "bytes", title=f"{bundle}: parameters by group")
    for size in description.groups:
        table.add_row(size.group, size.role, str(size.tensors), f"{size.parameters:,}", f"{size.bytes:,}")
    table.add_section()
    for role in ("shared", "personal", "frozen"):
        table.add_row("all", role, "", f"{description.parameters(role):,}", "", style="bold")
    console.print(table)
    console.print(f"on the wire: {description.payload / 1e6:.2f} MB for each site, round and direction")
    console.print(
        f"forward pass of an image: {description.trunk_gflop:.1f} GFLOP frozen trunk (cached), "
        f"{description.head_gflop:.1f} GFLOP trained head; a backward pass costs about twice the head"
    )


def _print_phases(strategy: Any) -> None:
    table = Table("phase", "trains", "experts", "epochs", "rate", "teacher", title=f"strategy {strategy.name}")
    for phase in (*strategy.phases, *strategy.final):
        teacher = f"{phase.distillation.teacher}, weight {phase.distillation.weight}" if phase.distillation else "none"
        row = (
            " + ".join(phase.trains),
            "on" if phase.experts else "off",
            str(phase.epochs),
            f"{phase.learning_rate:g}",
        )
        table.add_row(phase.name, *row, teacher)
    console.print(table)
    if (serving := strategy.serving) is not None:
        where = f"by cross-fit in {serving.folds} folds of its patients" if serving.folds else "on its validation cases"
        console.print(
            f"what a site keeps is found out {where}, after {', '.join(map(str, serving.epochs))} epochs, at "
            f"{', '.join(f'{alpha:g}' for alpha in serving.alphas)} of the way from the global model; "
            f"{'or what the site has alone; ' if serving.alone else ''}or the global model"
        )
