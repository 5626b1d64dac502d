"""The boundary: what a result may hold when it leaves a site or enters the server.

An allow-list that fails closed. A result is never passed on: a new `Shareable` is built from the parts that were
checked, and everything else (headers, metadata, further keys, nested objects) is left behind. Pure functions, shared by
the site's outgoing filter and the server's guard (see `filters`).

| task | what passes |
|---|---|
| any, failed | its return code, if NVFlare or `pfedsam.errors` knows it |
| `train`, `submit_model` | shared tensors of the plan as weight differences, listed metadata, listed metrics |
| `validate` | listed metrics, rounded |
| any other | its return code |

A number of `METADATA_BY_WEIGHTS` passes only where the strategy asks for it and the site allows it.

The values themselves are bounded, not understood: these rules keep personal tensors, names and texts at the site, and
do not stop a learner that was written to hide data in the values of shared tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import PFedSAMError, code_of_reply
from pfedsam.parameters import SHAREABLE_GROUPS, Manifest, TensorSpec, group_of, short
from pfedsam.training.gap_weights import LARGEST_GAP, rounded_gap

#: Metrics that may leave a site, of the global model; each is a number from 0 to 1.
METRICS: tuple[str, ...] = ("val_dice",)
#: Decimals of a metric that leaves: of a single case an exact Dice would tell the number of its lesion's voxels.
METRIC_DECIMALS = 2
#: Metadata keys of our own.
ROUND_KEY = "pfedsam_round"
FINGERPRINT_KEY = "pfedsam_fingerprint"
GAP_KEY = "pfedsam_gap"
#: Metadata of a weight difference. Metrics of the model before the training may go with it, as INITIAL_METRICS.
METADATA: tuple[str, ...] = (MetaKey.NUM_STEPS_CURRENT_ROUND, ROUND_KEY, FINGERPRINT_KEY)
#: Metadata that may go with a weight difference only where the strategy's `weights` are of this kind; else refused.
METADATA_BY_WEIGHTS: dict[str, tuple[str, ...]] = {"gaa": (GAP_KEY,)}
#: Tasks whose result is a weight difference.
MODEL_TASKS: tuple[str, ...] = (AppConstants.TASK_TRAIN, AppConstants.TASK_SUBMIT_MODEL)
#: No element of a weight difference may be larger.
LARGEST_VALUE = 1e4
#: What each listed metadata is, for people.
MEANINGS: dict[str, str] = {
    MetaKey.NUM_STEPS_CURRENT_ROUND: "number of training cases (1 where the job weighs all sites alike)",
    ROUND_KEY: "number of the round",
    FINGERPRINT_KEY: "SHA-256 of the public base weights and the network's settings",
    "val_dice": "Dice of the global model on the validation cases",
    GAP_KEY: "how far the round's model is from the one received, on training slices: mean divergence of a pixel",
}
#: Bound of the number of training cases and of the round.
LARGEST_COUNT = 10**6
#: Cookies that NVFlare's workflows set in task data and read again from the result.
COOKIES: frozenset[str] = frozenset(
    {ReservedKey.TASK_ID, ReservedKey.WORKFLOW, AppConstants.CONTRIBUTION_ROUND, AppConstants.MODEL_OWNER}
)

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LONGEST_TEXT = 256
_RETURN_CODES = frozenset(
    value for name, value in vars(ReturnCode).items() if not name.startswith("_") and isinstance(value, str)
)


@dataclass(frozen=True)
class SanitizedResult:
    """A result that was rebuilt from checked parts.

    Attributes:
        shareable: the new result.
        tensors: the arrays in it, by name.
        metadata: the metadata or metrics in it.
        excluded: number of personal tensors that were left out.
    """

    shareable: Shareable
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    excluded: int = 0

    @property
    def bytes_by_group(self) -> dict[str, int]:
        """Bytes of the arrays, by parameter group."""
        total: dict[str, int] = {}
        for name, array in self.tensors.items():
            total[group_of(name)] = total.get(group_of(name), 0) + array.nbytes
        return total

    def norm(self) -> float:
        """L2 norm over all arrays."""
        return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in self.tensors.values()))

    def sha256(self) -> str:
        """SHA-256 over the metadata and all arrays, in the order of their names."""
        digest = hashlib.sha256(json.dumps(self.metadata, sort_keys=True, default=str).encode())
        for name, array in sorted(self.tensors.items()):
            digest.update(f"{name}|{array.dtype}|{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def check_result(
    result: Shareable,
    task: str,
    *,
    shared: Manifest,
    personal: Collection[str] = (),
    further: Collection[str] = (),
    code: str,
) -> SanitizedResult:
    """Rebuild a task's result from checked parts.

    Args:
        result: the result; it may hold anything and is not changed.
        task: name of the task.
        shared: the tensors that must be in a weight difference, all of them and no others.
        personal: names that are left out. At the server there are none, so that a personal tensor is refused.
        further: metadata of `METADATA_BY_WEIGHTS` that may be in a weight difference; what is not named is refused.
        code: code to refuse with: E19 at a site, E20 at the server.

    Returns:
        The rebuilt result, without any header but its return code and content type.

    Raises:
        PFedSAMError: `code`, for anything that is not on the list or cannot be read; E12 if the manifest itself holds
            an unknown name.
    """
    try:
        return _check_result(result, task, shared, personal, further, code)
    except PFedSAMError:
        raise
    except Exception as error:
        raise PFedSAMError(code, f"the result could not be read ({type(error).__name__}).") from error


def with_cases(passed: SanitizedResult, cases: int) -> SanitizedResult:
    """A weight difference that has passed, with another number of training cases."""
    metadata = {**passed.metadata, MetaKey.NUM_STEPS_CURRENT_ROUND: cases}
    rebuilt = DXO(DataKind.WEIGHT_DIFF, data=dict(passed.tensors), meta=dict(metadata)).to_shareable()
    return replace(passed, shareable=rebuilt, metadata=metadata)


def check_headers(result: Shareable, *, code: str) -> dict[str, Any]:
    """The headers that NVFlare's server needs of a result, rebuilt.

    The cookie jar tells the aggregator the round and the evaluation the model's name; task name and id name the task;
    of the peer's properties the aggregator needs the site's name. All were set by NVFlare, the last three by the server
    itself; every other header is dropped.

    Args:
        result: the result as received.
        code: code to refuse with.

    Raises:
        PFedSAMError: `code`, for an unknown cookie or a value that is neither an int nor a short string.
    """
    try:
        return _check_headers(_headers(result, code), code)
    except PFedSAMError:
        raise
    except Exception as error:
        raise PFedSAMError(code, f"the headers could not be read ({type(error).__name__}).") from error


def rounded_metric(value: Any) -> float:
    """A metric as it may leave: with `METRIC_DECIMALS` decimals.

    Raises:
        ValueError: if it is no number from 0 to 1.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError("no number from 0 to 1")
    return round(float(value), METRIC_DECIMALS)


def told_names(metadata: Mapping[str, Any]) -> list[str]:
    """Sorted names of metadata and metrics; a metric that goes with a weight difference is `initial_metrics.<name>`."""
    beside = metadata.get(MetaKey.INITIAL_METRICS)
    if not isinstance(beside, dict):
        return sorted(map(str, metadata))
    names = [name for name in metadata if name != MetaKey.INITIAL_METRICS]
    return sorted([*map(str, names), *(f"{MetaKey.INITIAL_METRICS}.{name}" for name in beside)])


#: All that `told_names` may find in a result that has passed, in any job; see `METADATA_BY_WEIGHTS` for what more.
LISTED_NAMES = frozenset({*METADATA, *METRICS, *told_names({MetaKey.INITIAL_METRICS: dict.fromkeys(METRICS)})})


def allowed_return_code(return_code: Any) -> str:
    """The return code if NVFlare or `pfedsam.errors` knows it, else EXECUTION_EXCEPTION: it could hold any text."""
    if type(return_code) is str and (return_code in _RETURN_CODES or code_of_reply(return_code)):
        return return_code
    return ReturnCode.EXECUTION_EXCEPTION


def _check_result(
    result: Shareable, task: str, shared: Manifest, personal: Collection[str], further: Collection[str], code: str
) -> SanitizedResult:
    return_code = _headers(result, code).get(ReservedHeaderKey.RC, ReturnCode.OK)
    # nothing that came in goes on: each way out of here makes a new result of checked parts, so what nobody thought of
    # stays behind; types are compared with `type`, because a subclass could answer one thing now and another later
    if type(return_code) is not str or return_code != ReturnCode.OK:
        return SanitizedResult(make_reply(allowed_return_code(return_code)))
    if task in MODEL_TASKS:
        dxo = _dxo(result, DataKind.WEIGHT_DIFF, code)
        tensors, excluded = _tensors(dxo.data, shared, personal, code)
        metadata = _metadata(dxo.meta, further, code)
        rebuilt = DXO(DataKind.WEIGHT_DIFF, data=dict(tensors), meta=dict(metadata)).to_shareable()
        return SanitizedResult(rebuilt, tensors, metadata, excluded)
    if task == AppConstants.TASK_VALIDATION:
        metrics = _metrics(_dxo(result, DataKind.METRICS, code).data, code)
        return SanitizedResult(DXO(DataKind.METRICS, data=dict(metrics)).to_shareable(), metadata=metrics)
    return SanitizedResult(make_reply(ReturnCode.OK))


def _headers(result: Shareable, code: str) -> dict[str, Any]:
    if not isinstance(result, Shareable):
        raise PFedSAMError(code, f"the result is {type(result).__name__}, expected a Shareable.")
    headers = dict.get(result, ReservedHeaderKey.HEADERS, {})
    if type(headers) is not dict:
        raise PFedSAMError(code, f"the headers are {type(headers).__name__}, expected a dict.")
    return headers


def _dxo(result: Shareable, kind: DataKind, code: str) -> DXO:
    dxo = from_shareable(result)
    if type(dxo.data_kind) not in (str, DataKind) or dxo.data_kind != kind:
        raise PFedSAMError(code, f"the result's data kind is not {kind.value}.")
    if type(dxo.data) is not dict or type(dxo.meta) is not dict:
        raise PFedSAMError(code, "the result's data and metadata must be plain dicts.")
    return dxo


def _tensors(
    data: dict[str, Any], shared: Manifest, personal: Collection[str], code: str
) -> tuple[dict[str, np.ndarray], int]:
    # the plan is the job's word; the ceiling is this package's, so a job cannot raise it
    above = sorted({group_of(name) for name in shared} - SHAREABLE_GROUPS)
    if above:
        raise PFedSAMError(code, f"the plan shares group(s) {above}, which may never be shared.")
    if any(type(name) is not str for name in data):
        raise PFedSAMError(code, "a tensor's name is not a string.")
    excluded = [name for name in data if name in personal]
    unknown = sorted(set(data) - set(shared) - set(excluded))
    missing = sorted(set(shared) - (set(data) - set(excluded)))
    if unknown or missing:
        listed = [short([name[:_LONGEST_TEXT] for name in names]) for names in (missing, unknown)]
        raise PFedSAMError(code, f"missing tensors {listed[0]}, unknown tensors {listed[1]}.")
    return {name: _tensor(name, data[name], spec, code) for name, spec in shared.items()}, len(excluded)


def _tensor(name: str, value: Any, spec: TensorSpec, code: str) -> np.ndarray:
    if type(value) is not np.ndarray:
        raise PFedSAMError(code, f"'{name}' is {type(value).__name__}, expected a numpy array.")
    if value.shape != spec.shape or str(value.dtype) != spec.dtype or value.dtype.hasobject:
        raise PFedSAMError(
            code, f"'{name}' is {value.dtype}{list(value.shape)}, expected {spec.dtype}{list(spec.shape)}."
        )
    # a new dtype object, too: a dtype can carry metadata
    copy = np.empty(spec.shape, dtype=np.dtype(spec.dtype))
    copy[...] = value
    if copy.size and not (np.isfinite(copy).all() and copy.max() <= LARGEST_VALUE and copy.min() >= -LARGEST_VALUE):
        raise PFedSAMError(code, f"'{name}' holds values that are not finite or larger than {LARGEST_VALUE:g}.")
    return copy


def _metadata(meta: Mapping[str, Any], further: Collection[str], code: str) -> dict[str, Any]:
    fingerprint = meta.get(FINGERPRINT_KEY)
    if type(fingerprint) is not str or not _FINGERPRINT.fullmatch(fingerprint):
        raise PFedSAMError(code, f"metadata '{FINGERPRINT_KEY}' must be 64 hexadecimal digits.")
    metadata: dict[str, Any] = {
        ROUND_KEY: _count(meta, ROUND_KEY, 0, code),
        MetaKey.NUM_STEPS_CURRENT_ROUND: _count(meta, MetaKey.NUM_STEPS_CURRENT_ROUND, 1, code),
        FINGERPRINT_KEY: fingerprint,
    }
    if meta.get(MetaKey.INITIAL_METRICS) is not None:
        metadata[MetaKey.INITIAL_METRICS] = _metrics(meta[MetaKey.INITIAL_METRICS], code)
    if GAP_KEY in meta:
        if GAP_KEY not in further:
            raise PFedSAMError(code, f"metadata '{GAP_KEY}' is not for this site to tell in this job.")
        metadata[GAP_KEY] = _gap(meta[GAP_KEY], code)
    return metadata


def _gap(value: Any, code: str) -> float:
    told = rounded_gap(value) if type(value) is float and 0 <= value <= LARGEST_GAP else None
    if told is None:
        raise PFedSAMError(code, f"metadata '{GAP_KEY}' must be a float from 0 to {LARGEST_GAP:g}.")
    return told


def _count(meta: Mapping[str, Any], key: str, least: int, code: str) -> int:
    value = meta.get(key)
    if type(value) is not int or not least <= value <= LARGEST_COUNT:
        raise PFedSAMError(code, f"metadata '{key}' must be an int from {least} to {LARGEST_COUNT}.")
    return value


def _metrics(metrics: Any, code: str) -> dict[str, float]:
    if type(metrics) is not dict:
        raise PFedSAMError(code, f"metrics are {type(metrics).__name__}, expected a dict.")
    checked: dict[str, float] = {}
    for key, value in metrics.items():
        if type(key) is not str or key not in METRICS:
            raise PFedSAMError(code, f"a metric is not one of {list(METRICS)}.")
        try:
            checked[key] = rounded_metric(value)
        except ValueError as error:
            raise PFedSAMError(code, f"metric '{key}' is {error}.") from None
    return checked


def _check_headers(headers: Mapping[str, Any], code: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    jar = headers.get(ReservedHeaderKey.COOKIE_JAR)
    if jar is not None:
        if type(jar) is not dict or any(type(key) is not str or key not in COOKIES for key in jar):
            raise PFedSAMError(code, "the cookie jar holds an unknown cookie.")
        kept[ReservedHeaderKey.COOKIE_JAR] = {key: _plain(value, code) for key, value in jar.items()}
    for key in (ReservedHeaderKey.TASK_NAME, ReservedHeaderKey.TASK_ID):
        if key in headers:
            kept[key] = _plain(headers[key], code)
    peer = headers.get(ReservedHeaderKey.PEER_PROPS)
    if type(peer) is dict and ReservedKey.IDENTITY_NAME in peer:
        site = _plain(peer[ReservedKey.IDENTITY_NAME], code)
        kept[ReservedHeaderKey.PEER_PROPS] = {ReservedKey.IDENTITY_NAME: site}
    return kept


def _plain(value: Any, code: str) -> int | str:
    if type(value) is int or (type(value) is str and len(value) <= _LONGEST_TEXT):
        return value
    raise PFedSAMError(code, f"a header is {type(value).__name__}, expected an int or a short string.")
