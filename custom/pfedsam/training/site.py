"""One site's side of a federation: its bundle, its data, its rounds. Knows nothing of NVFlare.

The bundle owns loaders, transforms, loss and kind of optimiser; this class sets weights and phases on the bundle's
trainer and evaluator.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Events
from torch import Tensor

from pfedsam.data.seen import SEEN, Seen, patient_of
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import base_state, swapped_parameters
from pfedsam.storage.site_model import SiteModel
from pfedsam.training.by_validation import ByValidation
from pfedsam.training.choice import Choice
from pfedsam.training.cross_fit import CrossFit
from pfedsam.training.left_out import leave_out_trained
from pfedsam.training.phase import Phase
from pfedsam.training.prediction_gap import prediction_gap
from pfedsam.training.round_result import RoundResult
from pfedsam.training.serving import Serving
from pfedsam.training.site_tensors import SiteTensors
from pfedsam.training.soft_load import SoftLoad
from pfedsam.training.strategy import Strategy
from pfedsam.training.trainer import PhaseTrainer
from pfedsam.training.validation import LEAST_CASES, RoundSample, run_validation, validated_cases
from pfedsam.training.workflow import open_workflow

logger = logging.getLogger(__name__)


class SiteTrainer:
    """Trains and validates at one site.

    Args:
        bundle: name of an installed bundle.
        folder: the site folder.
        strategy: roles and phases.
        overrides: listed ids of the bundle's configuration with literal values.
        output_dir: where the bundle may write; stays at the site.
        device: `auto`, or a torch device.
        checkpoint: path of the base weights on this machine.
        feature_store: folder of features of the frozen trunk that runs on this machine share, or None.
        cases: at most so many training cases, or None for all: to see what a small site gains.
        label_map: what the site's label values mean, None if they are the bundle's; see
            `pfedsam.data.transforms.ClassChannelsd`.
        prepared: folder where prepared volumes are kept from one job to the next, see `pfedsam.data.kept_volumes`; None
            to keep none.
        least_validated: cases on which a large site validates at least in a round, see
            `pfedsam.training.validation.RoundSample`.
        most_epochs: of the final phase and the cross-fit together, where the strategy makes them longer at a site with
            few slices; None for no limit.

    Raises:
        PFedSAMError: from `open`, with the code of whatever is wrong in data, weights or configuration.
    """

    def __init__(
        self,
        bundle: str,
        folder: str | Path,
        strategy: Strategy,
        overrides: Mapping[str, Any] | None = None,
        output_dir: str | Path = "runs",
        device: str = "auto",
        checkpoint: str | None = None,
        feature_store: str | Path | None = None,
        cases: int | None = None,
        label_map: Mapping[str, str] | None = None,
        prepared: str | Path | None = None,
        least_validated: int = LEAST_CASES,
        most_epochs: int | None = None,
    ) -> None:
        self.most_epochs = most_epochs
        self.label_map, self.prepared, self.least_validated = label_map, prepared, least_validated
        self.checkpoint, self.feature_store, self.case_limit = checkpoint, feature_store, cases
        self.bundle, self.folder, self.strategy = bundle, Path(folder), strategy
        self.overrides, self.output_dir, self.device = overrides, Path(output_dir), device
        self.network: SegmentAnything
        self.trainer: PhaseTrainer
        self.tensors: SiteTensors
        self._seen = Seen.nothing()
        #: Of the global model, in rounds (True) and on all cases (False).
        self._global_dice: dict[bool, float] = {}
        self._answered: list[bool] = []
        #: What the site keeps and why, of a strategy that lets it find out; None before the final phase.
        self.served: Choice | None = None

    def open(self) -> None:
        """Build the bundle's training workflow on this site's data, and write down its split in `output_dir`."""
        opened = open_workflow(
            self.bundle,
            self.folder,
            self.strategy.roles,
            self.output_dir,
            overrides=self.overrides,
            device=self.device,
            checkpoint=self.checkpoint,
            feature_store=self.feature_store,
            case_limit=self.case_limit,
            label_map=self.label_map,
            prepared=self.prepared,
            unlabelled=self.strategy.learns_from_unlabelled,
            augment=self.strategy.augment,
        )
        self.network, self.trainer, self.evaluator = opened.network, opened.trainer, opened.evaluator
        self.cases = [case for case in opened.cases if "label" in case]
        self.unlabelled_cases = [case for case in opened.cases if "label" not in case]
        self.validation_cases = opened.validation_cases
        self.tensors = SiteTensors(self.network, self.strategy.roles, self.strategy.needs_unshared)
        if self.strategy.needs_unshared:
            self.trainer.base = base_state(self.network, self.strategy.roles)
        load = self.strategy.load
        self._load = SoftLoad(load, self.trainer, self.tensors) if load is not None else None
        self._seed = opened.seed
        self._sample = RoundSample(opened.seed, self.least_validated)

    @property
    def fingerprint(self) -> str:
        """Of the base weights and the network's settings."""
        return str(self.network.base_fingerprint)

    @property
    def weight(self) -> int:
        """n_k, the site's weight in the mean: its number of training cases, or 1 if the strategy weighs all alike."""
        return len(self.cases) if self.strategy.weights == "cases" else 1

    def receive(self, theta: Mapping[str, np.ndarray | Tensor], fingerprint: str | None) -> None:
        """Load the global model.

        Raises:
            PFedSAMError: E11 if it belongs to other base weights, E12 if its tensors do not fit.
        """
        if fingerprint != self.fingerprint:
            raise PFedSAMError(
                ErrorCode.OTHER_BASE_WEIGHTS,
                f"the federation has base weights {str(fingerprint)[:12]}, this site {self.fingerprint[:12]}.",
                "Use the checkpoint, backbone and image size that the federation agreed on.",
            )
        if self.tensors.receive(theta):
            self._global_dice.clear()

    def restore(self, model: SiteModel) -> None:
        """Take back the personal part, its optimiser's moments and what it has seen.

        Validation cases of patients that the model was trained on, in an earlier job with another split, are named in
        the log and left out: their Dice would be too high. To train on what was validated on before is fine, as nothing
        is measured on it any more.

        Raises:
            PFedSAMError: E08 if no validation case is left, E13 if tensors do not fit.
        """
        self._remember(model)
        self.tensors.restore(model.personal, model.copy)
        self.trainer.load_moments(model.moments)

    def _remember(self, model: SiteModel) -> None:
        """Go on from what a saved model has seen."""
        known = Seen.of(model.info)
        if known is None:
            logger.warning("the saved model does not say which patients it was trained on")
        self._seen = known or Seen.nothing(whole=False)
        kept = leave_out_trained(self.evaluator, self.validation_cases, self._seen, self.folder)
        if len(kept) < len(self.validation_cases):
            self._global_dice.clear()
        self.validation_cases = kept

    def validate(self, experts: bool, in_round: bool = False) -> dict[str, float]:
        """Mean Dice over the validation cases, as volumes, of the global (experts off) or the personal model.

        The personal part works beside theta as received, also after a phase that has trained theta. The global model's
        Dice is kept until another theta is received: NVFlare asks for the last one several times.

        Args:
            experts: the personal model.
            in_round: a large site takes a draw of its cases, see `pfedsam.training.validation.RoundSample`.
        """
        if experts or in_round not in self._global_dice:
            with (
                self.network.experts(experts),
                swapped_parameters(self.network, self.tensors.beside() if experts else {}),
                self._sample.of(self.evaluator) if in_round else nullcontext(),
            ):
                dice, answered = run_validation(self.evaluator, self.trainer.exclusive)
            if experts:
                return {"val_dice": dice}
            self._global_dice[in_round], self._answered = dice, answered
        return {"val_dice": self._global_dice[in_round]}

    @property
    def answers(self) -> bool:
        """Whether the Dice of the global model validated last says how good it is, and not how large the lesions are.

        The Dice of a model that predicts everything is a function of the lesion's volume alone, and that of one that
        predicts nothing tells which cases have none. So at least half of the validation cases must have a class whose
        prediction is of ordinary size, see `pfedsam.training.validation.is_answer`. A model that was made to
        predict a fixed region of ordinary size is not found out.
        """
        return bool(self._answered) and 2 * sum(self._answered) >= len(self._answered)

    def validates(self, round_number: int) -> bool:
        """Whether the strategy asks for a validation before the training of this round."""
        return (round_number + 1) % self.strategy.validate_every == 0

    def personal_dice(self, round_number: int) -> float | None:
        """Validation Dice of the personal model after the training of a round, None if the rounds train none or the
        strategy asks for no validation in this one.
        """
        if not (self.strategy.rounds_are_personal and self.validates(round_number)):
            return None
        return self.validate(experts=True, in_round=True)["val_dice"]

    def train(self, round_number: int) -> RoundResult:
        """One round beside the global model received last. If it fails or is stopped, the model is as before."""
        loaded = self._load.around(round_number) if self._load else nullcontext()
        with self.tensors.all_or_nothing(self.trainer), loaded:
            result = self._run(self.strategy.phases, round_number)
            if self.strategy.tells_gap and not self.trainer.should_stop():
                result.gap = prediction_gap(self.trainer, self.tensors.received, round_number)
        result.personal = self.tensors.personal()
        self._forget_global_dice()
        result.delta = self.tensors.delta()
        return result

    def finish(self, round_number: int) -> RoundResult:
        """The final personal phase beside the global model received last: nothing is to be sent.

        What is kept of it is what `interpolation` of the strategy says, or what the site finds out by itself, see
        `serving`. If it fails or is stopped, the model is as before.
        """
        with self.tensors.all_or_nothing(self.trainer):
            if self._load:
                self._load.serve(round_number)
            if self.strategy.serving is None:
                result = self._run(self.strategy.final, round_number)
                self.tensors.interpolate(self.strategy.interpolation)
            else:
                result = self._serve(self.strategy.final[0], self.strategy.serving, round_number)
        result.personal = self.tensors.personal()
        self._forget_global_dice()
        return result

    def _serve(self, phase: Phase, serving: Serving, round_number: int) -> RoundResult:
        """The final phase as long, and as much of it, as the site finds best for itself, see `Serving`."""
        serving = serving.stretched(self.trainer.state.epoch_length or 1, self.most_epochs)
        serve = self._by_cross_fit if serving.folds else self._by_validation
        self.served, result = serve(phase, serving, round_number)
        self._forget_global_dice()
        logger.info(self.served.sentence)
        return result

    def _by_validation(self, phase: Phase, serving: Serving, round_number: int) -> tuple[Choice, RoundResult]:
        result = RoundResult({}, {})

        def train(phase: Phase) -> None:
            part = self._run((phase,), round_number)
            result.phases |= part.phases
            result.gates = part.gates or result.gates

        def dice() -> list[float]:
            return validated_cases(self.evaluator, self.trainer.exclusive)

        patients = [patient_of(case) for case in self.validation_cases]
        return ByValidation(self.trainer, self.tensors, dice, patients).run(phase, serving, train), result

    def _by_cross_fit(self, phase: Phase, serving: Serving, round_number: int) -> tuple[Choice, RoundResult]:
        fit = CrossFit(self.trainer, self.tensors, self.cases, self._seed)
        choice = fit.run(phase, serving, lambda fold: self._run((fold,), round_number))
        result, kept = RoundResult({}, {}), choice.candidate
        if kept.alone and serving.alone:
            self.tensors.begin_alone()
            result = self._run((serving.alone,), round_number)
        elif kept.epochs:
            phase = phase.model_copy(update={"epochs": max(serving.epochs)})
            with self.trainer.add_event_handler(Events.EPOCH_COMPLETED, _stop_after, kept.epochs):
                result = self._run((phase,), round_number)
        self._forget_global_dice()
        self.tensors.interpolate(kept.alpha)
        if kept.epochs and not self.trainer.should_stop():
            gain = self.validate(experts=True)["val_dice"] - self.validate(experts=False)["val_dice"]
            choice = choice.confirmed(gain, len(self.validation_cases))
            if not choice.candidate.epochs:
                self.tensors.interpolate(0)
        return choice, result

    def _forget_global_dice(self) -> None:
        """Personal tensors beside the experts also work with the experts off (as FedRep's head)."""
        if set(self.strategy.personal) - {"experts"}:
            self._global_dice.clear()

    def model(self, **info: Any) -> SiteModel:
        """The personal part with the shared part *as received*: the pair that was trained together."""
        seen = self._seen.add("validation", map(patient_of, self.validation_cases)).to_dict()
        about = {"bundle": self.bundle, "strategy": self.strategy.name, "overrides": dict(self.overrides or {})}
        told = {**about, SEEN: seen, **info}
        if self.served is not None:
            told["served"] = self.served.to_dict()
        model = SiteModel.of(self.network, self.strategy.roles, **told)
        model.shared, model.moments = dict(self.tensors.received), self.trainer.moments()
        model.personal = self.tensors.personal()
        return model

    def _run(self, phases: tuple[Phase, ...], round_number: int) -> RoundResult:
        result = RoundResult({}, {})
        self._seen = self._seen.add("training", map(patient_of, [*self.cases, *self.unlabelled_cases]))
        for number, phase in enumerate(phases):
            for layer in self.network.expert_layers().values():
                layer.forget_usage()
            with self.tensors.theta_of(phase):
                frozen_this_round = self.strategy.frozen_this_round(round_number) if "shared" in phase.trains else ()
                roles, anchor = self.strategy.roles, self.tensors.received
                self.trainer.set_phase(
                    phase, roles, round_number, number, frozen_this_round=frozen_this_round, anchor=anchor
                )
                self.trainer.run()
            report = result.phases[phase.name] = self.trainer.report
            if phase.experts:
                result.gates = {name: layer.usage() for name, layer in self.network.expert_layers().items()}
            logger.info(
                "round %s, phase '%s': %d steps, mean loss %.3f, %d steps distilled",
                round_number,
                phase.name,
                report.steps,
                report.mean_loss,
                report.distilled_steps,
            )
        return result


def _stop_after(engine: Any, epochs: int) -> None:
    """Let a phase end after some of its epochs."""
    if engine.state.epoch >= epochs:
        engine.terminate()
