"""Jobs as folders: copies of a job with other settings, its locked form, and the job of a strategy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import JobMetaKey

from pfedsam.bundles import folder
from pfedsam.deployment.job_files import (
    MEAN,
    META,
    arguments_of,
    check_settings,
    find_job,
    plan_settings,
    read_json,
)
from pfedsam.deployment.job_privacy import Privacy, add_filters, check_encryption
from pfedsam.deployment.job_tracker import set_tracker
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors, when_whole
from pfedsam.ownership import MARKER, require_sealed, seal
from pfedsam.storage.global_model import SCHEMA, SCHEMA_VERSION, round_of
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE, PLAN_ID, SERVER, component_of
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.reported_weights import REPORTED
from pfedsam.training.strategy import Strategy

#: Name of the global model that a job carries.
CARRIED = "theta0.safetensors"
#: A plan promises so many sites in each round, if the server waits for so many; see `pfedsam.federated.least_sites`.
PROMISED = 3
_LEAST_SITES = {"id": "least_sites", "path": "pfedsam.federated.least_sites.LeastSites"}
#: Our aggregator, for every rule but the plain mean, and for downloads that differ.
_ROBUST = "pfedsam.federated.aggregators.RobustAggregator"
#: The kind of folder that is written here, see `pfedsam.ownership`.
_FOLDER = "job"


def export_job(
    source: Path,
    out: Path,
    *,
    locked: bool = False,
    byoc: bool = False,
    plan: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    persistor: Mapping[str, Any] | None = None,
    theta0: Path | None = None,
    wait: float | None = None,
    tracker: str | None = None,
    privacy: Privacy | None = None,
    name: str | None = None,
    force: bool = False,
) -> Path:
    """Write a copy of a job.

    Args:
        source: the job folder.
        out: folder to write; it must not exist, or be an exported job that is as it was written.
        locked: leave out `app/custom`, so that the job carries no code; each site must then allow its classes.
        byoc: bring the code, bundles and strategies in `app/custom`, for sites that allow code in jobs and have the
            libraries of `app/custom/requirements.txt` but not this package, or another version of it.
        plan: what the plan shall say, over what it says.
        server: top-level settings of the server's configuration, for example `num_rounds`; see
            `pfedsam.deployment.job_files.SERVER_SETTINGS`. `min_clients` also goes to meta.json: with fewer sites
            NVFlare does not start the job, and the server stops it. The plan promises the sites that no round has
            fewer, up to `PROMISED`, unless `plan` says something else of `least_sites`.
        persistor: arguments of the persistor to set.
        theta0: a global model to begin with (`pfedsam init-global`, or that of a job); the job carries a copy.
        wait: seconds that a round waits for the other sites when `min_clients` have answered.
        tracker: where the server writes the sites' scalars, see `pfedsam.deployment.job_tracker`; None: as in `source`.
        privacy: further filters, after ours at the sites and before the guard at the server.
        name: of the job, None for that of `source`.
        force: replace a job folder whosever it is, as in a run folder of ours; another folder is never replaced.

    Raises:
        PFedSAMError: E32 if the job shall be locked and carry code, or be encrypted where something else than the mean
            is taken, or if `source` and `out` lie in each other; E31 if TenSEAL is not installed; E16 or E18 if the
            plan, a setting of the server or the tracker is impossible; E10 if `theta0` is no global model; E24 if
            `out` is something else than an exported job.
    """
    check_settings(source, plan or {}, server or {})
    if theta0 is not None:
        _require_global_model(theta0)
    if locked and byoc:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION, "a locked job carries no code.", "--locked and --byoc exclude each other."
        )
    if privacy and privacy.encrypt:
        check_encryption({**plan_settings(source), **(plan or {})})
    full_plan = {**plan_settings(source), **_promised(server or {}), **(plan or {})}
    carried = {} if theta0 is None else {"theta0": CARRIED}
    with _job_folder(source, out, force) as path:
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("__pycache__", MARKER))
        if locked:
            shutil.rmtree(path / "app" / "custom", ignore_errors=True)
        if byoc:
            _add_code(path / "app" / "custom")
        (path / "app" / "config" / PLAN_FILE).write_text(_pretty(full_plan))
        for side in (SERVER, CLIENT):
            config = read_json(path / "app" / "config" / side)
            component_of(config, PLAN_ID).pop("args", None)  # of a job of before
            if side == SERVER:
                _set_aggregator(config, full_plan)
                _count_sites(config, full_plan)
                config.update(server or {})
                arguments_of(config, "persistor").update({**(persistor or {}), **carried})
                _set_wait(config, wait)
                set_tracker(config, tracker, full_plan["federation"])
            add_filters(config, side, privacy or Privacy())
            (path / "app" / "config" / side).write_text(_pretty(config))
        if theta0 is not None:
            # beside the configuration: a job that carries it there is still one without code
            shutil.copy(theta0, path / "app" / "config" / CARRIED)
        meta = {**read_json(path / META), **({"name": name} if name else {})}
        meta |= {key: value for key, value in (server or {}).items() if key == JobMetaKey.MIN_CLIENTS.value}
        (path / META).write_text(_pretty(meta))
    return out


@contextmanager
def _job_folder(source: Path, out: Path, force: bool) -> Iterator[Path]:
    """A folder to write a job to, which is sealed and takes the place of `out` when it is complete."""
    original, place = source.resolve(), out.resolve()
    if original == place or original in place.parents or place in original.parents:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"{out} is the job that is copied, or one lies in the other.",
            "Choose another folder.",
        )
    require_sealed(out, _FOLDER, force)
    if out.is_dir() and any(out.iterdir()) and not (out / META).is_file():
        raise PFedSAMError(
            ErrorCode.NOT_OURS, f"{out} is no job folder, so it is not replaced.", "Choose another folder."
        )
    with when_whole(out) as path:
        yield path
        seal(path, _FOLDER)


def make_job(strategy: str, out: Path, template: str = "pfedsam", force: bool = False) -> Path:
    """Write the NVFlare job of a strategy: the checked-in jobs are what this writes.

    Args:
        strategy: name or path of a strategy file; the job has its name.
        out: folder to write, as in `export_job`.
        template: the job that everything but the plan and the aggregator is taken from.
        force: as in `export_job`.

    Raises:
        PFedSAMError: E28 if there is no such strategy, E32 if it needs no server; E24 if `out` is something else than
            an exported job.
    """
    file = find_strategy(strategy)
    if file.kind != "federated":
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"strategy '{strategy}' needs no server, so it has no job.",
            "Use `pfedsam compare`.",
        )
    plan = {"strategy": file.strategy, "overrides": file.overrides}
    return export_job(find_job(template), out, plan=plan, name=file.checked().name, force=force)


def _require_global_model(path: Path) -> None:
    """Refuse what the server could not begin with: another file, a model of another version, an encrypted one."""
    round_of(path)
    schema = read_safetensors(path)[1].get(SCHEMA)
    if schema != SCHEMA_VERSION:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"{path} is no global model that a job can begin with: its schema is {schema}, expected {SCHEMA_VERSION}.",
            "Write it with `pfedsam init-global` of this version, or take a global model that is not encrypted.",
        )


def _promised(server: Mapping[str, Any]) -> dict[str, int]:
    """What the plan promises of the sites of a round: as many as the server waits for, up to `PROMISED`."""
    return {"least_sites": min(PROMISED, int(server["min_clients"]))} if "min_clients" in server else {}


def _set_wait(config: dict[str, Any], wait: float | None) -> None:
    """How long each round waits, in the workflow that waits for `min_clients`."""
    if wait is None:
        return
    rounds = [one for one in config["workflows"] if one.get("path", "").endswith(".ScatterAndGather")]
    if not rounds:
        raise PFedSAMError(ErrorCode.CONTRADICTION, "the job has no rounds to wait in.", "Leave out --wait.")
    for workflow in rounds:
        workflow["args"]["wait_time_after_min_received"] = wait


def _count_sites(config: dict[str, Any], plan: Mapping[str, Any]) -> None:
    """The component that keeps what the plan says of the sites, in a job that was made without it."""
    present = any(
        isinstance(component, dict) and component.get("id") == _LEAST_SITES["id"] for component in config["components"]
    )
    if not present and (plan.get("least_sites") or plan.get("missing_sites")):
        config["components"].append(dict(_LEAST_SITES))


def _set_aggregator(config: dict[str, Any], plan: Mapping[str, Any]) -> None:
    """The aggregator of the plan's rule, in the place of one of the two; another one is somebody's own and stays."""
    component = component_of(config, "aggregator")
    strategy = Strategy.of(plan["strategy"])
    if component["path"] not in (MEAN["path"], _ROBUST):
        asked = [name for name in ("downloads", "server") if getattr(strategy, name) is not None]
        asked += [f"weights: {strategy.weights}"] if strategy.weights in REPORTED else []
        if asked:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"the job has an aggregator of its own, '{component['path']}', which knows nothing of {asked}.",
                f"Take {_ROBUST}, or leave {asked} out of the strategy.",
            )
        return
    component.pop("args", None)
    # NVFlare's own knows no site once it has added its update, and no earlier round
    plain = strategy.aggregation == "mean" and strategy.downloads is None and strategy.server is None
    component.update(MEAN if plain else {"path": _ROBUST})


def _add_code(custom: Path) -> None:
    """This package with its bundles and jobs, as an installed one has them, and the libraries that it needs."""
    package = custom / "pfedsam"
    leave_out = shutil.ignore_patterns("__pycache__", "eval", "models")
    shutil.copytree(Path(__file__).resolve().parents[1], package, ignore=leave_out)
    for kind in ("bundles", "jobs"):
        shutil.copytree(folder(kind), package / kind, ignore=leave_out, dirs_exist_ok=True)
    needed = [line for line in requires("pfedsam") or () if "extra ==" not in line]
    (custom / "requirements.txt").write_text("\n".join(needed) + "\n")


def _pretty(content: Mapping[str, Any]) -> str:
    """JSON with short lists of words on one line."""
    words = re.compile(r'\[\s+("[^"\[\]{}]*"(?:,\s+"[^"\[\]{}]*")*)\s+\]')
    text = json.dumps(content, indent=2)
    return words.sub(lambda match: "[" + re.sub(r"\s+", " ", match.group(1)) + "]", text) + "\n"
