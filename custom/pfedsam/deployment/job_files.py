"""The files of a job: found by name, read, and checked before anything is written or run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.bundles import checked_overrides, folder, installed_bundles
from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.federated.plan import Plan
from pfedsam.files import read_object
from pfedsam.ranges import MOST_ROUNDS, MOST_SECONDS, MOST_SITES
from pfedsam.storage.job_plan import MAKE_JOB, SERVER, component_of, plan_arguments
from pfedsam.training.strategy import Strategy

#: NVFlare's aggregator, for the plain mean: it adds updates up as they come.
MEAN: dict[str, Any] = {
    "path": "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
    "args": {"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": True},
}
META = "meta.json"
#: Numbers at the top of the server's configuration: least, most, unit. A job that was resumed may have no round left.
SERVER_SETTINGS: dict[str, tuple[int, int, str]] = {
    "num_rounds": (0, MOST_ROUNDS, "rounds"),
    "start_round": (0, MOST_ROUNDS, "rounds"),
    "min_clients": (1, MOST_SITES, "sites"),
    "validation_timeout": (0, MOST_SECONDS, "seconds"),
    "final_phase_timeout": (0, MOST_SECONDS, "seconds"),
}
#: Arguments of the workflows that are seconds; a text names a setting of the server.
_SECONDS = ("wait_time_after_min_received", "train_timeout", "validation_timeout", "timeout", "task_check_period")


def find_job(name_or_path: str) -> Path:
    """A job folder by path, or the packaged job of that name.

    Raises:
        PFedSAMError: E28 if there is none, E29 if its files are no job's.
    """
    for path in (Path(name_or_path), folder("jobs") / name_or_path):
        if (path / META).is_file():
            read_json(path / META)
            plan_settings(path)
            return path
    known = sorted(path.parent.name for path in folder("jobs").glob(f"*/{META}"))
    raise PFedSAMError(ErrorCode.UNKNOWN_NAME, f"there is no job '{name_or_path}'.", f"Packaged jobs: {known}.")


def plan_settings(job: Path) -> dict[str, Any]:
    """What a job's plan says, among it `bundle` and `strategy` (E29 if it is no job of ours).

    The strategy of a job that was made when the plain mean was the default names it here: it stays with it.
    """
    config, plan = server_settings(job), plan_arguments(job / "app")
    kinds: dict[str, tuple[type, ...]] = {key: (str,) for key in ("federation", "bundle")}
    kinds |= {"strategy": (dict,), "overrides": (dict, type(None))}
    for key, kind in kinds.items():
        if not isinstance(plan.get(key), kind):
            raise PFedSAMError(
                ErrorCode.CONFIGURATION_FILE, f"{job}: {key} of the plan is {shown(plan.get(key))}.", MAKE_JOB
            )
    if component_of(config, "aggregator")["path"] == MEAN["path"]:
        plan["strategy"] = {"aggregation": "mean", **plan["strategy"]}
    return plan


def server_settings(job: Path) -> dict[str, Any]:
    """The server's configuration (E29 if it is none, E16 if a setting of it is impossible)."""
    path = job / "app" / "config" / SERVER
    config = read_json(path)
    _check_server(config, str(path))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of a job.

    Raises:
        PFedSAMError: E29 if the file is missing, not readable, or holds something else.
    """
    return read_object(path, MAKE_JOB)


def arguments_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a component (E29 if they are none); they can be changed in place."""
    arguments = component_of(config, name).setdefault("args", {})
    if not isinstance(arguments, dict):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"the arguments of the job's '{name}' are {shown(arguments)}.", MAKE_JOB
        )
    return arguments


def check_settings(source: Path, plan: Mapping[str, Any], server: Mapping[str, Any]) -> None:
    """Refuse a job that no site or server could run, before anything is written."""
    config = {**server_settings(source), **server}
    _check_server(config, str(source))
    full_plan = {**plan_settings(source), **plan}
    known = set(inspect.signature(Plan).parameters)
    if set(full_plan) - known:
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"{source}: the plan has {sorted(full_plan)}, expected no others than {sorted(known)}.",
            MAKE_JOB,
        )
    if "bundle" in plan or full_plan["bundle"] in installed_bundles():
        Plan(**full_plan).checked()
        return
    # of a bundle that only those who run the job have, the rest can be checked
    checked_overrides(full_plan.get("overrides"))
    Strategy.of(full_plan["strategy"])


def _check_server(config: Mapping[str, Any], where: str) -> None:
    """Refuse a setting of the server that is no whole number in its range."""
    for key, (least, most, unit) in SERVER_SETTINGS.items():
        value = config.get(key, least)
        if type(value) is not int or not least <= value <= most:
            raise _not_between(where, key, value, f"a whole number from {least} to {most} {unit}")
    workflows = config.get("workflows")
    for workflow in workflows if isinstance(workflows, list) else ():
        arguments = workflow.get("args") if isinstance(workflow, dict) else None
        if not isinstance(arguments, dict):
            continue
        for key in _SECONDS:
            value = arguments.get(key, 0)
            if not isinstance(value, str) and (type(value) not in (int, float) or not 0 <= value <= MOST_SECONDS):
                raise _not_between(where, key, value, f"a number from 0 to {MOST_SECONDS} seconds")


def _not_between(where: str, key: str, value: Any, expected: str) -> PFedSAMError:
    message = f"{where}: {key} is {shown(value)}, expected {expected}."
    return PFedSAMError(ErrorCode.WRONG_SETTING, message, "Correct the job, or give another number.")
