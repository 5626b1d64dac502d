"""Jobs as folders: the checked-in one, copies of it with other settings, and its locked form."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pfedsam.bundles import checked_overrides, folder, installed_bundles
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.literals import CLIENT, SERVER
from pfedsam.federated.packing import Precision
from pfedsam.federated.plan import Plan
from pfedsam.files import when_whole
from pfedsam.ownership import MARKER, require_sealed, seal
from pfedsam.ranges import MOST_ROUNDS, MOST_SECONDS, MOST_SITES
from pfedsam.settings import shown
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.strategy import Strategy

#: NVFlare's aggregator, for the plain mean: it adds updates up as they come.
MEAN: dict[str, Any] = {
    "path": "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
    "args": {"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": True},
}
#: A plan promises so many sites in each round, if the server waits for so many; see `pfedsam.federated.least_sites`.
PROMISED = 3
_LEAST_SITES = {"id": "least_sites", "path": "pfedsam.federated.least_sites.LeastSites"}
#: For every other rule.
_ROBUST = "pfedsam.federated.aggregators.RobustAggregator"
#: Rules that can be taken of ciphertexts, as a plain mean: what would be bounded cannot be seen.
_OF_CIPHERTEXTS = ("norm_clipped", "mean", "alternate")
#: Filters that `Privacy` adds.
NOISE = "pfedsam.federated.privacy.ClipAndNoise"
PACK, UNPACK = "pfedsam.federated.packing.PackPayload", "pfedsam.federated.packing.UnpackPayload"
_CKKS, _HE = "pfedsam.federated.encryption", "nvflare.app_opt.he"
ENCRYPT, DECRYPT, GUARD = f"{_CKKS}.EncryptUpdate", f"{_CKKS}.DecryptModel", f"{_CKKS}.EncryptedGuard"
#: Components of the server that `Privacy.encrypt` replaces.
ENCRYPTED: dict[str, dict[str, Any]] = {
    "aggregator": {
        "path": f"{_HE}.intime_accumulate_model_aggregator.HEInTimeAccumulateWeightedAggregator",
        # the sites multiply by their number of cases before they encrypt
        "args": {"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": False},
    },
    "shareable_generator": {"path": f"{_HE}.model_shareable_generator.HEModelShareableGenerator"},
    "persistor": {"path": f"{_CKKS}.EncryptedStatePersistor"},
}
#: Tasks whose data are a global model.
_MODEL_FOR = ("train", "validate", "configure")
META = "meta.json"
#: The kind of folder that is written here, see `pfedsam.ownership`.
_FOLDER = "job"
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
_JOB = "Start from a job of this project (`pfedsam job make`)."


@dataclass(frozen=True)
class Privacy:
    """What is done to an update after the allow-list, in this order.

    Attributes:
        clip, noise_multiplier: see `pfedsam.federated.privacy.ClipAndNoise`; no clip for none of it.
        precision: `fp32`, or see `pfedsam.federated.packing.PackPayload`.
        encrypt: see `pfedsam.federated.encryption`.

    Raises:
        PFedSAMError: E16 for values that no site could apply or noise without a clip, E32 for a packed payload that
            shall be encrypted.
    """

    clip: float | None = None
    noise_multiplier: float = 0.0
    precision: str = "fp32"
    encrypt: bool = False

    def __post_init__(self) -> None:
        given = f"clip {self.clip}, noise {self.noise_multiplier}, precision '{self.precision}'"
        if (self.clip is not None and not 0 < self.clip < math.inf) or not 0 <= self.noise_multiplier < math.inf:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"{given}.", "Clip is the largest norm, above 0; noise is a multiple of it."
            )
        if self.noise_multiplier and self.clip is None:
            raise PFedSAMError(ErrorCode.WRONG_SETTING, f"{given}.", "Noise needs a clip: it is a multiple of it.")
        if self.precision not in ("fp32", *get_args(Precision)):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"{given}.", f"Precisions: fp32, {', '.join(get_args(Precision))}."
            )
        if self.encrypt and self.precision != "fp32":
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"{self.precision} cannot be added up encrypted.",
                "Take fp32, or no encryption.",
            )


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


def export_job(
    source: Path,
    out: Path,
    *,
    locked: bool = False,
    byoc: bool = False,
    plan: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    persistor: Mapping[str, Any] | None = None,
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
        plan: arguments of the plan to set on both sides.
        server: top-level settings of the server's configuration, for example `num_rounds`; see `SERVER_SETTINGS`. With
            `min_clients` the plan promises that no round has fewer sites, up to `PROMISED`, unless `plan` says
            something else of `least_sites`.
        persistor: arguments of the persistor to set.
        privacy: further filters, after ours at the sites and before the guard at the server.
        name: of the job, None for that of `source`.
        force: replace a job folder whosever it is, as in a run folder of ours; another folder is never replaced.

    Raises:
        PFedSAMError: E32 if the job shall be locked and carry code, or be encrypted where something else than the mean
            is taken, or if `source` and `out` lie in each other; E31 if TenSEAL is not installed; E16 or E18 if the
            plan or a setting of the server is impossible; E24 if `out` is something else than an exported job.
    """
    _check_settings(source, plan or {}, server or {})
    if locked and byoc:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION, "a locked job carries no code.", "--locked and --byoc exclude each other."
        )
    if privacy and privacy.encrypt:
        _check_encryption({**plan_settings(source), **(plan or {})})
    told = {"strategy": plan_settings(source)["strategy"], **_promised(server or {}), **(plan or {})}
    with _job_folder(source, out, force) as path:
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("__pycache__", MARKER))
        if locked:
            shutil.rmtree(path / "app" / "custom", ignore_errors=True)
        if byoc:
            _add_code(path / "app" / "custom")
        for side in (SERVER, CLIENT):
            config = read_json(path / "app" / "config" / side)
            _arguments(config, "plan").update(told)
            if side == SERVER:
                _set_aggregator(config)
                _set_promise(config)
                config.update(server or {})
                _arguments(config, "persistor").update(persistor or {})
            _add_filters(config, side, privacy or Privacy())
            (path / "app" / "config" / side).write_text(_pretty(config))
        meta = read_json(path / META)
        (path / META).write_text(_pretty({**meta, "name": name} if name else meta))
    return out


@contextmanager
def _job_folder(source: Path, out: Path, force: bool) -> Iterator[Path]:
    """A folder to write a job to, which is sealed and takes the place of `out` when it is complete."""
    found, place = source.resolve(), out.resolve()
    if found == place or found in place.parents or place in found.parents:
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


def _promised(server: Mapping[str, Any]) -> dict[str, int]:
    """What the plan promises of the sites of a round: as many as the server waits for, up to `PROMISED`."""
    return {"least_sites": min(PROMISED, int(server["min_clients"]))} if "min_clients" in server else {}


def _set_promise(config: dict[str, Any]) -> None:
    """The component that keeps the plan's promise, in a job that was made without it."""
    found = any(isinstance(one, dict) and one.get("id") == _LEAST_SITES["id"] for one in config["components"])
    if not found and _arguments(config, "plan").get("least_sites"):
        config["components"].append(dict(_LEAST_SITES))


def _set_aggregator(config: dict[str, Any]) -> None:
    """The aggregator of the plan's rule, in the place of one of the two; another one is somebody's own and stays."""
    component, rule = _component(config, "aggregator"), Strategy.of(_arguments(config, "plan")["strategy"]).aggregation
    if component["path"] not in (MEAN["path"], _ROBUST):
        return
    component.pop("args", None)
    component.update(MEAN if rule == "mean" else {"path": _ROBUST})


def _add_code(custom: Path) -> None:
    """This package with its bundles and jobs, as an installed one has them, and the libraries that it needs."""
    package = custom / "pfedsam"
    leave_out = shutil.ignore_patterns("__pycache__", "eval", "models")
    shutil.copytree(Path(__file__).resolve().parents[1], package, ignore=leave_out)
    for kind in ("bundles", "jobs"):
        shutil.copytree(folder(kind), package / kind, ignore=leave_out, dirs_exist_ok=True)
    needed = [line for line in requires("pfedsam") or () if "extra ==" not in line]
    (custom / "requirements.txt").write_text("\n".join(needed) + "\n")


def _add_filters(config: dict[str, Any], side: str, privacy: Privacy) -> None:
    """Noise, packing, encryption at the sites; unpacking at the server, before the guard."""
    chain = config["task_result_filters"][0]["filters"]
    if side == SERVER:
        if privacy.precision != "fp32":
            chain.insert(0, {"path": UNPACK})
        if privacy.encrypt:
            _encrypt_server(config)
        return
    if privacy.clip is not None:
        chain.append({"path": NOISE, "args": {"clip": privacy.clip, "noise_multiplier": privacy.noise_multiplier}})
    if privacy.precision != "fp32":
        chain.append({"path": PACK, "args": {"precision": privacy.precision}})
    if privacy.encrypt:
        chain.append({"path": ENCRYPT})
        config["task_data_filters"].append({"tasks": [*_MODEL_FOR], "filters": [{"path": DECRYPT}]})


def _check_encryption(plan: Mapping[str, Any]) -> None:
    if find_spec("tenseal") is None:
        raise PFedSAMError(ErrorCode.MISSING_LIBRARY, "encryption needs TenSEAL.", "Install the extra 'he' of pfedsam.")
    rule = Strategy.of(plan["strategy"]).aggregation
    if rule not in _OF_CIPHERTEXTS:
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"only the mean can be taken of ciphertexts, not '{rule}'.",
            "Set aggregation to mean.",
        )


def _encrypt_server(config: dict[str, Any]) -> None:
    """The guard, aggregator, generator and persistor of ciphertexts in place of the plain ones."""
    config["task_result_filters"][0]["filters"] = [{"path": GUARD}]
    for name, told in ENCRYPTED.items():
        _component(config, name).update(told)


def _pretty(content: Mapping[str, Any]) -> str:
    """JSON with short lists of words on one line."""
    words = re.compile(r'\[\s+("[^"\[\]{}]*"(?:,\s+"[^"\[\]{}]*")*)\s+\]')
    text = json.dumps(content, indent=2)
    return words.sub(lambda found: "[" + re.sub(r"\s+", " ", found.group(1)) + "]", text) + "\n"


def plan_settings(job: Path) -> dict[str, Any]:
    """Arguments of a job's plan, among them `bundle` and `strategy` (E29 if it is no job of ours).

    The strategy of a job that was made when the plain mean was the default names it here: it stays with it.
    """
    config = server_settings(job)
    plan = _arguments(config, "plan")
    kinds: dict[str, tuple[type, ...]] = {"bundle": (str,), "strategy": (dict,), "overrides": (dict, type(None))}
    for key, kind in kinds.items():
        if not isinstance(plan.get(key), kind):
            raise PFedSAMError(
                ErrorCode.CONFIGURATION_FILE, f"{job}: {key} of the plan is {shown(plan.get(key))}.", _JOB
            )
    if _component(config, "aggregator")["path"] == MEAN["path"]:
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"{path} is not readable: {error}.", _JOB) from None
    if not isinstance(content, dict):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"{path} is {shown(content)}, expected keys with values.", _JOB
        )
    return content


def _component(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    components = config.get("components")
    for component in components if isinstance(components, list) else ():
        if isinstance(component, dict) and component.get("id") == name:
            return component
    raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"the job has no component '{name}'.", _JOB)


def _arguments(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a component; they can be changed in place."""
    found = _component(config, name).setdefault("args", {})
    if not isinstance(found, dict):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"the arguments of the job's '{name}' are {shown(found)}.", _JOB
        )
    return found


def _check_settings(source: Path, plan: Mapping[str, Any], server: Mapping[str, Any]) -> None:
    """Refuse a job that no site or server could run, before anything is written."""
    config = {**server_settings(source), **server}
    _check_server(config, str(source))
    told = {**plan_settings(source), **plan}
    known = {name: one for name, one in inspect.signature(Plan.__init__).parameters.items() if name != "self"}
    needed = {name for name, one in known.items() if one.default is one.empty}
    if needed - set(told) or set(told) - set(known):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"{source}: the plan has {sorted(told)}, expected {sorted(needed)} and no others than {sorted(known)}.",
            _JOB,
        )
    if "bundle" in plan or told["bundle"] in installed_bundles():
        Plan(**told).checked()
        return
    # of a bundle that only those who run the job have, the rest can be checked
    checked_overrides(told.get("overrides"))
    Strategy.of(told["strategy"])


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
    told = f"{where}: {key} is {shown(value)}, expected {expected}."
    return PFedSAMError(ErrorCode.WRONG_SETTING, told, "Correct the job, or give another number.")
