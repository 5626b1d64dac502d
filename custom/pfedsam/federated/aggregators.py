"""The rules of `pfedsam.training.aggregation` at the server: no site owns the mean, and the log names who tried.

The updates of a round are held until it closes, because a rule looks at all of them: memory at the server grows by one
payload a site. `aggregation: mean` keeps NVFlare's own aggregator, which adds them up as they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector

from pfedsam.federated.boundary import GAP_KEY, METRICS
from pfedsam.federated.downloads import ServedDownloads
from pfedsam.federated.plan import Plan, plan_of
from pfedsam.federated.records import ROUNDS_FILE, append_record
from pfedsam.training.aggregation import combine, robust_mean
from pfedsam.training.judgement import JUDGING, Judgement, counted_cases
from pfedsam.training.reported_weights import REPORTED, WeightsByReport
from pfedsam.training.server_step import ServerSteps


class RobustAggregator(Aggregator):
    """The change of the global model by the plan's rule, see `pfedsam.training.aggregation`.

    After a resume the way of the model counts from the resumed one, and its first round is a first round again. Takes
    the guard's word for names, shapes and finite values. Writes one record a round, and one line a site.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, tuple[int, dict[str, np.ndarray]]] = {}
        #: What each site has reported, by the kind of weights that follow from it, and those weights.
        self._told: dict[str, dict[str, float]] = {}
        self._site_weights = WeightsByReport()
        #: The global model that this run began with, once a round is done.
        self._start: dict[str, torch.Tensor] | None = None
        self._served = ServedDownloads()
        self._steps: ServerSteps | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Forget an earlier run; let each site have its own download, where the plan says so."""
        if event_type == EventType.START_RUN:
            self._held, self._start, self._told, self._site_weights = {}, None, {}, WeightsByReport()
            self._served, self._steps = ServedDownloads(), None
        elif event_type == AppEventType.INITIAL_MODEL_LOADED:
            self._served.begin(fl_ctx)
        elif event_type == AppEventType.AFTER_SHAREABLE_TO_LEARNABLE:
            self._served.keep(fl_ctx)
        elif event_type == EventType.BEFORE_TASK_DATA_FILTER:
            self._served.replace(fl_ctx)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Hold a site's update; False for a code, another round, or a second update of the site in this round."""
        site = str(shareable.get_peer_prop(key=ReservedKey.IDENTITY_NAME, default="?"))
        if shareable.get_return_code() != ReturnCode.OK:
            self.logger.warning(f"site {site} sent no update: {shareable.get_return_code()}")
            return False
        contribution_round, current = (
            shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND),
            fl_ctx.get_prop(AppConstants.CURRENT_ROUND),
        )
        if contribution_round != current or site in self._held:
            why = "its second of this round" if contribution_round == current else f"of round {contribution_round}"
            self.logger.warning(f"site {site}: an update is left out, it is {why}; this is round {current}")
            return False
        dxo = from_shareable(shareable)
        self._held[site] = int(dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1)), dxo.data
        self._told[site] = {kind: value for kind, read in _REPORTS.items() if (value := read(dxo)) is not None}
        return True

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The change of the global model; none if no site sent an update."""
        plan, current = plan_of(fl_ctx), fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        theta = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        updates, told_by = dict(sorted(self._held.items())), self._told
        self._held, self._told = {}, {}
        if not updates:
            self.logger.error(f"round {current}: no site sent an update, the global model stays as it is")
            self._served.skip(fl_ctx)
            return DXO(
                DataKind.WEIGHT_DIFF, data={name: np.zeros_like(value) for name, value in theta.items()}
            ).to_shareable()
        rule = self.rule(plan)
        deltas = {site: _tensors(data) for site, (_, data) in updates.items()}
        weights, ceilings = self._weights(plan, updates, told_by, fl_ctx), [plan.most_of(site) for site in updates]
        told: dict[str, Any] = {}
        if plan.checked().downloads is None:
            mean, judged = combine(_tensors(theta), list(deltas.values()), weights, rule, ceilings, self._start)
            change = self._stepped(plan, mean)
        else:
            outcome = self._served.next(fl_ctx, _tensors(theta), deltas, weights, ceilings, self._start)
            change, judged, told = outcome.change, outcome.judged, {"downloads": outcome.told}
        self._start = self._start or {name: tensor.clone() for name, tensor in _tensors(theta).items()}
        self._tell(current, rule, dict(zip(updates, judged, strict=True)), fl_ctx, told)
        data = {name: change[name].numpy().astype(np.asarray(value).dtype) for name, value in theta.items()}
        return DXO(DataKind.WEIGHT_DIFF, data=data).to_shareable()

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget what was held."""
        self._held, self._told = {}, {}

    def _weights(
        self,
        plan: Plan,
        updates: Mapping[str, tuple[int, Any]],
        told_by: Mapping[str, Mapping[str, float]],
        fl_ctx: FLContext,
    ) -> list[float]:
        """What each site counts before it is judged: its cases, or what follows from its report."""
        kind = plan.checked().weights
        if kind not in REPORTED:
            return [cases for cases, _ in updates.values()]
        number, rounds = (int(fl_ctx.get_prop(key, 0)) for key in (AppConstants.CURRENT_ROUND, AppConstants.NUM_ROUNDS))
        # what NVFlare calls the number of rounds are those of this run: a resumed one begins later
        rounds += int(fl_ctx.get_prop(AppConstants.START_ROUND, 0))
        reports = {site: told_by.get(site, {}).get(kind) for site in updates}
        return self._site_weights.next(kind, reports, number, rounds)

    def _stepped(self, plan: Plan, mean: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The server's step along the mean; where a job goes on after a resume, it begins without momentum."""
        settings = plan.checked().server
        if settings is None:
            return mean
        self._steps = self._steps or ServerSteps(settings)
        return self._steps.next(mean)

    def rule(self, plan: Plan) -> str:
        """The plan's rule."""
        return plan.checked().aggregation

    def _tell(
        self, number: int, rule: str, judged: dict[str, Judgement], fl_ctx: FLContext, more: Mapping[str, Any]
    ) -> None:
        run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        sites = {site: _rounded(judgement) for site, judgement in judged.items()}
        append_record(run_dir, ROUNDS_FILE, {"round": number, "rule": rule, "sites": sites, **more})
        total = sum(judgement.counted for judgement in judged.values()) or 1.0
        for site, judgement in judged.items():
            line = f"round {number}: site {site}: {told(judgement)}, share {judgement.counted / total:.2f}"
            doubtful = rule in JUDGING and judgement.changed
            (self.logger.warning if doubtful else self.logger.info)(line)


class ProductAggregator(RobustAggregator):
    """`svd` whatever the plan says: the name in jobs that were made before there were other rules."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def rule(self, plan: Plan) -> str:
        """Always `svd`."""
        return "svd"


class RobustModelSelector(IntimeModelSelector):
    """The best global model by the sites' validation Dice, so that no single site chooses it.

    The score of a round is the mean of the sites' Dice weighted by their numbers of training cases, as far as the
    aggregation counts them, and from three sites on without the smallest and the largest Dice.

    Args:
        key_metric: name of the metric.
    """

    def __init__(self, key_metric: str = METRICS[0]) -> None:
        super().__init__(key_metric=key_metric)
        self._told: dict[str, tuple[float, int]] = {}

    def _before_accept(self, fl_ctx: FLContext) -> bool:
        result = fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
        current = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if not isinstance(result, Shareable) or current == 0:  # the first global model is nobody's work
            return False
        if result.get_cookie(AppConstants.CONTRIBUTION_ROUND) != current:
            return False
        dxo = from_shareable(result)
        value = dice_beside(dxo, self.key_metric)
        if value is None:
            return False
        site = str(result.get_peer_prop(key=ReservedKey.IDENTITY_NAME, default="?"))
        self._told.setdefault(site, (float(value), int(dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1))))
        self.logger.info(f"round {current}: site {site}: validation Dice of the global model {value:g}")
        return True

    def _before_aggregate(self, fl_ctx: FLContext) -> bool:
        if self._told:
            plan = plan_of(fl_ctx)
            values, cases = zip(*self._told.values(), strict=True)
            weights = list(map(float, cases))
            if plan.checked().aggregation in JUDGING:
                weights = counted_cases(weights, [plan.most_of(site) for site in self._told])
            score = robust_mean(values, weights)
            self.validation_metric_weighted_sum = self.raw_validation_metric_weighted_sum = score
            self.validation_metric_sum_of_weights = 1
        return bool(super()._before_aggregate(fl_ctx))

    def _reset_stats(self) -> None:
        super()._reset_stats()
        self._told = {}


def dice_beside(dxo: DXO, metric: str = METRICS[0]) -> float | None:
    """The Dice of the global model that a site has sent with its update, None if it has sent none."""
    value = (dxo.get_meta_prop(MetaKey.INITIAL_METRICS) or {}).get(metric)
    return float(value) if value is not None and math.isfinite(value) else None


def gap_beside(dxo: DXO) -> float | None:
    """How far a site's training has moved its predictions, None if it has told nothing."""
    value = dxo.get_meta_prop(GAP_KEY)
    return float(value) if value is not None and math.isfinite(value) else None


#: How the report is read that weights of each kind follow from.
_REPORTS: dict[str, Callable[[DXO], float | None]] = {"dro": dice_beside, "gaa": gap_beside}


def told(one: Judgement) -> str:
    """What became of an update, for people."""
    words = [f"{one.cases:g} cases"]
    if 0 < one.counted < one.cases:
        words.append(f"counted as {one.counted:g}")
    words.append(f"norm {one.norm:.3g}")
    if one.clipped_to is not None and not one.left_out:
        words.append(f"clipped to {one.clipped_to:.3g}")
    if one.cosine is not None:
        words.append(f"direction {one.cosine:.2f}")
    if one.why:
        words.append(f"{'left out' if one.left_out else 'doubtful'}: {one.why}")
    return ", ".join(words)


def _rounded(judgement: Judgement) -> dict[str, Any]:
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(judgement).items()
    }


def _tensors(arrays: Any) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(np.asarray(value)) for name, value in arrays.items()}
