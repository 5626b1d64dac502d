"""The NVFlare learner: it moves tensors between tasks, `SiteTrainer` and the state on disk, and decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import MetaKey
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model_learner import ModelLearner
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY, GAP_KEY, ROUND_KEY
from pfedsam.federated.collection import leave_out_what_is_there
from pfedsam.federated.filters import outgoing_filters, require_outgoing_filter
from pfedsam.federated.global_dice import BEST_DICE, best_dice_of, fall
from pfedsam.federated.least_sites import require_enough_sites
from pfedsam.federated.literals import require_literal
from pfedsam.federated.log_streaming import require_no_log_streaming
from pfedsam.federated.plan import Plan, plan_of
from pfedsam.federated.privacy import require_policy
from pfedsam.federated.scalars import ListedScalars, phase_tag
from pfedsam.federated.settings import (
    SiteSettings,
    TimeLimit,
    prepared_folder,
    require_agreed,
    require_epochs,
    require_round,
    require_unseen,
    site_folder,
    site_settings,
)
from pfedsam.federated.versions import require_same_versions
from pfedsam.storage.job_plan import CLIENT
from pfedsam.storage.state import SiteState, state_root
from pfedsam.training.preparation import require_trainable
from pfedsam.training.round_result import RoundResult
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy
from pfedsam.training.validation import LEAST_CASES

#: When a job has begun at the site, in its folder there.
STARTED = "pfedsam_started"
#: Tasks whose results must go through the outgoing filter.
FILTERED_TASKS = (
    AppConstants.TASK_TRAIN,
    AppConstants.TASK_SUBMIT_MODEL,
    AppConstants.TASK_VALIDATION,
    AppConstants.TASK_CONFIGURE,
)


class PFedSAMLearner(ModelLearner):
    """Trains a site's part of a pFedSAM federation.

    An error is told to the server as `SITE_REFUSED:Exx`; its sentence stays in the site's log.

    Args:
        device: `auto` or a torch device; the site's file overrides it.
        threads: of torch, 0 for a default; the site's file overrides it. The default is one in a simulation, where
            the sites share the cores, else torch's own.
        scalars_id: component `ListedScalars`, or an empty string for none.
    """

    def __init__(self, device: str = "auto", threads: int = 0, scalars_id: str = "scalars") -> None:
        super().__init__()
        self.device = device
        self.threads = threads
        self.scalars_id = scalars_id
        self._started = False
        self._problem: PFedSAMError | None = None
        self._state: SiteState | None = None
        #: Dice on the validation cases of the best global model so far, kept with the state, and of the one at hand.
        self._best_dice: float | None = None
        self._global_dice: float | None = None
        self._tells_dice = False

    def initialize(self) -> None:
        """Start once; a problem is kept and told with every task, because NVFlare does not try again."""
        if self._started:
            return
        self._started = True
        self._guarded(self._start)
        leave_out_what_is_there()

    def validate(self, model: FLModel) -> str | FLModel | None:
        """Dice of the global model (experts off) on the site's validation cases.

        Before the training of a round that is not validated, or at a site that tells no Dice, NVFlare gets None and
        sends no metrics with the result. The same for a global model that predicts nothing or everything (see
        `SiteTrainer.answers`), but in a simulation.

        A Dice far below the best one so far is told in the site's log (see `fall`): the global model may be
        damaged or made to do harm. Where the strategy asks for no validation in a round, none is added for that.
        """
        return self._guarded(self._validate, model)

    def train(self, model: FLModel) -> str | FLModel:
        """One round; returns the whole trainable state, of which the outgoing filter lets the shared part pass."""
        return self._guarded(self._train, model)

    def configure(self, model: FLModel) -> None:
        """The final personal phase beside the final global model. Nothing but a return code leaves.

        Raises:
            RuntimeError: if it failed; NVFlare then answers with its own code.
        """
        if isinstance(self._guarded(self._finish, model), str):
            raise RuntimeError("the final personal phase failed; the reason is in the lines above")

    def get_model(self, model_name: str) -> str | FLModel:
        """A site's model is not for the server: the task is refused."""
        return ReturnCode.TASK_UNSUPPORTED

    def finalize(self) -> None:
        """Give the lock of the state back."""
        if self._state is not None:
            self._state.close()

    def _start(self) -> None:
        app = self.workspace.get_app_dir(self.job_id)
        # first: the sentences of all other problems are in the logs
        require_no_log_streaming(self.fl_ctx, app)
        require_literal(app, CLIENT)
        require_outgoing_filter(self.fl_ctx, FILTERED_TASKS)
        require_same_versions(self.fl_ctx)
        plan = plan_of(self.fl_ctx)
        strategy, site = plan.checked(), site_settings(self.fl_ctx)
        require_agreed(plan.federation, site)
        require_enough_sites(self.fl_ctx, plan, site.least_sites)
        require_unseen(strategy, site, self._is_simulated())
        self._require_within(strategy, site)
        trained = outgoing_filters(self.fl_ctx, AppConstants.TASK_TRAIN)
        require_policy(trained, site.largest_clip, site.least_noise)
        self._set_threads(site.threads or self.threads)
        folder = site_folder(site.data_root, self.site_name)
        prepared = prepared_folder(site, self.site_name)
        require_trainable(folder, plan.bundle, plan.overrides, label_map=site.labels, prepared=prepared)
        output = Path(self.workspace.get_run_dir(self.job_id)) / "bundle"
        device = site.device or self.device
        settings: dict[str, Any] = {"device": device, "checkpoint": site.checkpoint}
        settings |= {"label_map": site.labels, "prepared": prepared}
        settings["most_epochs"] = site.most_epochs
        settings["least_validated"] = max(LEAST_CASES, site.least_validation_cases)
        self._local = SiteTrainer(plan.bundle, folder, strategy, plan.overrides, output, **settings)
        self._local.open()
        self._open_state(plan, site.state_root)
        simulated = self._is_simulated()
        self._scalars = self._find_scalars(simulated if site.curves is None else site.curves)
        self._enough_cases = len(self._local.validation_cases) >= site.least_validation_cases
        self._local.trainer.should_stop = lambda: self.is_aborted() or self._time.over()
        self.logger.info(
            f"{len(self._local.cases)} training and {len(self._local.validation_cases)} validation cases, "
            f"device {self._local.trainer.state.device}, {torch.get_num_threads()} thread(s)"
        )

    def _require_within(self, strategy: Strategy, site: SiteSettings) -> None:
        """Keep to the site's own limits on epochs, rounds and hours."""
        require_epochs(strategy, site)
        self._site = site
        self._time = TimeLimit(Path(self.workspace.get_run_dir(self.job_id)) / STARTED, site.most_hours)
        self._time.start()

    def _find_scalars(self, wanted: bool) -> ListedScalars:
        component = self.engine.get_component(self.scalars_id) if self.scalars_id and wanted else None
        # one that was never told of the run sends nothing
        return component if isinstance(component, ListedScalars) else ListedScalars()

    def _open_state(self, plan: Plan, root: str | None) -> None:
        fingerprint = self._local.fingerprint
        self._state = SiteState(state_root(root), plan.federation, self.site_name, plan.bundle, fingerprint)
        self._state.open()
        saved = self._state.load()
        if saved is not None:
            self._state.require_same_kind(saved, self._local.strategy)
            self._local.restore(saved)
            self._best_dice = best_dice_of(saved.info)
            self.logger.info(f"personal state of round {saved.info.get('round')} taken from {self._state.folder}")

    def _validate(self, model: FLModel) -> FLModel | None:
        before_training = self.current_round is not None
        self._global_dice = None
        if before_training and not self._local.validates(int(self.current_round)):
            return None
        dice = self._receive_and_validate(model, in_round=before_training)
        if before_training:
            self._send_dice("val_dice_global", dice)
            self.logger.info(f"round {self.current_round}: global Dice {dice:.3f}")
        if self._tells_dice:
            return FLModel(metrics={"val_dice": dice})
        return None if before_training else FLModel(metrics={})

    def _train(self, model: FLModel) -> str | FLModel:
        require_round(int(self.current_round), self._site)
        self._time.require_left()
        self._local.receive(model.params, model.meta.get(FINGERPRINT_KEY))
        result = self._local.train(self.current_round)
        if self.is_aborted():
            return ReturnCode.TASK_ABORTED
        self._time.require_left()  # a round that was stopped is not kept
        personal = self._local.personal_dice(self.current_round)
        self._save(final=False, val_dice_global=self._global_dice, val_dice_personal=personal)
        self._report(result)
        if personal is not None:
            self._send_dice("val_dice_personal", personal)
            self.logger.info(f"round {self.current_round}: personal Dice {personal:.3f}")
        return FLModel(
            params_type=ParamsType.DIFF,
            params={name: np.ascontiguousarray(t.numpy()) for name, t in {**result.delta, **result.personal}.items()},
            meta={
                MetaKey.NUM_STEPS_CURRENT_ROUND: self._local.weight,
                ROUND_KEY: int(self.current_round),
                FINGERPRINT_KEY: self._local.fingerprint,
                **self._further(result),
            },
        )

    def _further(self, result: RoundResult) -> dict[str, float]:
        """The numbers that the strategy asks for and the site is willing to tell."""
        numbers = {GAP_KEY: result.gap}
        told = {name: value for name, value in numbers.items() if value is not None}
        return {name: told[name] for name in self._site.allowed(told)}

    def _finish(self, model: FLModel) -> None:
        before = self._receive_and_validate(model, in_round=False)
        result = self._local.finish(self.current_round)
        if self.is_aborted():
            return
        self._time.require_left()
        after = self._local.validate(experts=True)["val_dice"]
        self._save(final=True, val_dice_global=before, val_dice_personal=after)
        self._report(result)
        self._send_dice("val_dice_global", before)
        self._send_dice("val_dice_personal", after)
        self.logger.info(f"final personal phase: global Dice {before:.3f}, personal Dice {after:.3f}")

    def _receive_and_validate(self, model: FLModel, in_round: bool) -> float:
        self._time.require_left()
        self._local.receive(model.params, model.meta.get(FINGERPRINT_KEY))
        self._global_dice = dice = self._local.validate(experts=False, in_round=in_round)["val_dice"]
        self._tells_dice = self._enough_cases and (self._is_simulated() or self._local.answers)
        if self._enough_cases and not self._tells_dice:
            self.logger.warning(
                "the global model predicts nothing or nearly everything on most of the validation cases: its Dice "
                "would tell how large the lesions are, so it is not sent. Expected in the first rounds only."
            )
        if self.current_round is not None:  # else the global evaluation, also of models of earlier rounds
            if fell := fall(dice, self._best_dice):
                self.logger.warning(f"round {self.current_round}: {fell}")
            self._best_dice = max(dice, self._best_dice or 0.0)
        return dice

    def _send_dice(self, tag: str, dice: float) -> None:
        if self._tells_dice:
            self._scalars.send(tag, dice, self.current_round)

    def _save(self, final: bool, **metrics: float | None) -> None:
        assert self._state is not None
        info = {**metrics, BEST_DICE: self._best_dice}
        known = {name: value for name, value in info.items() if value is not None}
        self._state.save(self._local.model(round=int(self.current_round), final=final, **known))

    def _report(self, result: RoundResult) -> None:
        for name, phase in result.phases.items():
            tag = phase_tag(self._local.strategy, name)
            self._scalars.send(f"loss/{tag}", phase.mean_loss, self.current_round)
            if phase.steps:
                self._scalars.send(f"distilled_share/{tag}", phase.distilled_steps / phase.steps, self.current_round)
        for number, usage in enumerate(result.gates.values()):
            for key, value in usage.items():
                tag = "gate_entropy" if key == "entropy" else f"expert_{key}"
                self._scalars.send(f"{tag}/layer_{number}", value, self.current_round)

    def _guarded(self, work: Any, *args: Any) -> Any:
        """Do a part of a task; a problem becomes its code. A problem at the start is told again with every task."""
        try:
            if self._problem is not None:
                raise self._problem
            return work(*args)
        except PFedSAMError as error:
            problem = error
        except Exception as error:
            self.logger.exception("unexpected error")
            problem = PFedSAMError(ErrorCode.UNEXPECTED, f"{type(error).__name__}: {error}")
        if work == self._start:
            self._problem = problem
        # not NVFlare's log_error: that also fires an event, which a job may forward
        self.logger.error(str(problem))
        return problem.as_reply()

    def _is_simulated(self) -> bool:
        return bool(self.fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False))

    def _set_threads(self, threads: int) -> None:
        if not threads and self._is_simulated():
            threads = 1
        if threads:
            torch.set_num_threads(threads)
