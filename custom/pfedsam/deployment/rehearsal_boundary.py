"""What of a trained round would leave the site: the site's filter, then the job's, then what the server's guard sees.

The rules are those of `pfedsam.federated.boundary`, which the filter and the guard apply in a job.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from pydantic import BaseModel

from pfedsam.deployment.job_privacy import NOISE, PACK
from pfedsam.errors import ErrorCode
from pfedsam.federated.boundary import (
    FINGERPRINT_KEY,
    GAP_KEY,
    MEANINGS,
    METRICS,
    ROUND_KEY,
    check_result,
    told_names,
)
from pfedsam.federated.filters import check_site_ceiling
from pfedsam.federated.packing import PACKED, UnpackPayload, pack
from pfedsam.federated.plan import Plan
from pfedsam.federated.privacy import ClipAndNoise
from pfedsam.parameters import group_of
from pfedsam.training.round_result import RoundResult
from pfedsam.training.site import SiteTrainer

#: The Dice that goes with a result.
_DICE = f"{MetaKey.INITIAL_METRICS}.{METRICS[0]}"


class Group(BaseModel):
    """Tensors, numbers and bytes of a parameter group, as 32-bit numbers."""

    tensors: int = 0
    numbers: int = 0
    bytes: int = 0


class Leaving(BaseModel):
    """What would leave the site with the result of one round.

    Attributes:
        groups: of the tensors, by parameter group.
        bytes: of the tensors as they travel, after packing.
        scalars: what goes with them, by name: what it is.
        stays: personal tensors that the learner has handed over and the filter has kept back.
        done: what the job's filters did, in words.
        not_done: filters of the job that were not run here.
    """

    groups: dict[str, Group]
    bytes: int
    scalars: dict[str, str]
    stays: int
    done: list[str] = []
    not_done: list[str] = []

    def without_dice_if(self, untold: bool) -> Leaving:
        """As the learner does it at a site with few validation cases, or of a model that predicts nothing."""
        kept = {name: what for name, what in self.scalars.items() if not (untold and name == _DICE)}
        return self.model_copy(update={"scalars": kept})


def leaving(
    result: RoundResult,
    local: SiteTrainer,
    plan: Plan,
    filters: Sequence[Mapping[str, Any]],
    *,
    cases: int,
    may_share: Collection[str] | None,
    further: Collection[str] = (),
) -> Leaving:
    """Take the result of a round through the boundary.

    Args:
        result: of the round; with its personal tensors, as the learner hands it over.
        local: the site that has trained it.
        plan: of the job.
        filters: of the job behind ours, each with `path` and `args`.
        cases: training cases of the site.
        may_share: groups that the site is willing to share, None for no limit but the code's.
        further: numbers that the strategy asks for and the site is willing to tell.

    Raises:
        PFedSAMError: E19 if the site would refuse its own result, E20 if the server's guard would.
    """
    shared, personal = plan.shared(), plan.personal()
    check_site_ceiling(shared, may_share)
    passed = check_result(
        _handed_over(result, local, cases, further),
        AppConstants.TASK_TRAIN,
        shared=shared,
        personal=personal,
        further=further,
        code=ErrorCode.REFUSED_BY_FILTER,
    )
    groups: dict[str, Group] = {}
    for name, array in passed.tensors.items():
        group = groups.setdefault(group_of(name), Group())
        group.tensors, group.numbers = group.tensors + 1, group.numbers + array.size
        group.bytes += array.nbytes
    travels, done, not_done = passed.shareable, list[str](), list[str]()
    for one in filters:
        travels, told = _filtered(travels, one)
        (done if told else not_done).append(told or str(one["path"]).rpartition(".")[2])
    sent = from_shareable(travels)
    unpacked = UnpackPayload().process(travels, FLContext())
    check_result(
        unpacked,
        AppConstants.TASK_TRAIN,
        shared=shared,
        further=plan.further(),
        code=ErrorCode.REFUSED_BY_GUARD,
    )
    names = told_names(passed.metadata)
    return Leaving(
        groups=groups,
        bytes=sum(array.nbytes for array in sent.data.values()),
        scalars={name: MEANINGS[name.rpartition(".")[2]] for name in names},
        stays=passed.excluded,
        done=done,
        not_done=not_done,
    )


def _handed_over(result: RoundResult, local: SiteTrainer, cases: int, further: Collection[str]) -> Shareable:
    """As the learner hands a round over: the whole trainable state, and what NVFlare adds of the validation before."""
    state = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in {**result.delta, **result.personal}.items()}
    metadata: dict[str, Any] = {
        MetaKey.NUM_STEPS_CURRENT_ROUND: cases if local.strategy.weights == "cases" else 1,
        ROUND_KEY: 0,
        FINGERPRINT_KEY: local.fingerprint,
        MetaKey.INITIAL_METRICS: {METRICS[0]: 0.0},
    }
    if GAP_KEY in further and result.gap is not None:
        metadata[GAP_KEY] = result.gap
    return DXO(DataKind.WEIGHT_DIFF, data=state, meta=metadata).to_shareable()


def _filtered(result: Shareable, named: Mapping[str, Any]) -> tuple[Shareable, str]:
    """A result after a filter of the job, and what it did; no words for one that cannot be run here."""
    arguments = dict(named.get("args") or {})
    if named["path"] == NOISE:
        noise = ClipAndNoise(**arguments)
        return noise.process(result, FLContext()), f"clip {noise.clip:g}, noise {noise.noise_multiplier:g} times that"
    if named["path"] == PACK:
        dxo, precision = from_shareable(result), arguments.get("precision", "int8")
        dxo.data, _, scales = pack(dxo.data, precision, {})
        dxo.meta = {**dxo.meta, PACKED: {"precision": precision, "scales": scales}}
        return dxo.to_shareable(), f"packed as {precision}"
    return result, ""
