"""One site's side of a federation: its bundle, its data, its rounds. Knows nothing of NVFlare.

The bundle owns loaders, transforms, loss and kind of optimiser; this class sets weights and phases on the bundle's
trainer and evaluator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from pfedsam.bundles import find_bundle, local_settings
from pfedsam.data.seen import SEEN, Seen, patient_of
from pfedsam.data.sites import write_split
from pfedsam.errors import ErrorCode, PFedSAMError, first_of_ours
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import (
    COPY,
    check_state,
    load_personal_state,
    load_shared_state,
    manifest,
    personal_state,
    shared_state,
    swapped_parameters,
    trains_encoder,
)
from pfedsam.storage.site_model import SiteModel
from pfedsam.training.feature_store import store_settings
from pfedsam.training.left_out import leave_out
from pfedsam.training.strategy import Phase, Strategy
from pfedsam.training.trainer import PhaseReport, PhaseTrainer, reset

logger = logging.getLogger(__name__)

#: Which cases are in which section, for people; in the output folder, which stays at the site.
SPLIT_FILE = "split.json"
#: A case is answered by a prediction of a class only if it covers at least and at most this share of the input.
LEAST_COVERED, MOST_COVERED = 1e-5, 0.5


@dataclass
class RoundResult:
    """What a round gave: `delta` of the shared tensors, the trained `personal` ones, and a report of each phase."""

    delta: dict[str, Tensor]
    personal: dict[str, Tensor]
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    gates: dict[str, dict[str, float]] = field(default_factory=dict)


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
    ) -> None:
        self.label_map = label_map
        self.checkpoint, self.feature_store, self.case_limit = checkpoint, feature_store, cases
        self.bundle, self.folder, self.strategy = bundle, Path(folder), strategy
        self.overrides, self.output_dir, self.device = overrides, Path(output_dir), device
        self.network: SegmentAnything
        self.trainer: PhaseTrainer
        self._received: dict[str, Tensor] = {}
        self._copy: dict[str, Tensor] = {}
        self._seen = Seen.nothing()
        self._global_dice: float | None = None
        self._answered: list[bool] = []

    def open(self) -> None:
        """Build the bundle's training workflow on this site's data, and write down its split in `output_dir`."""
        root = find_bundle(self.bundle)
        try:
            settings: dict[str, Any] = {
                "bundle_root": str(root),
                "dataset_dir": str(self.folder),
                "output_dir": str(self.output_dir),
            }
            settings |= {"train#handlers": "$[]", "validate#handlers": "$[]"}  # the round validates, not the epochs
            settings |= store_settings(self.feature_store)
            if self.label_map is not None:
                settings["label_map"] = dict(self.label_map)
            if self.case_limit is not None:
                all_cases = "datalist(@dataset_dir, 'training', seed=@seed, folds=@folds)"
                settings["train#data_list"] = f"${all_cases}[:{int(self.case_limit)}]"
            if self.device != "auto":
                settings["device"] = f"$torch.device({self.device!r})"
            workflow = ConfigWorkflow(
                config_file=str(root / "configs" / "train.json"),
                meta_file=str(root / "configs" / "metadata.json"),
                logging_file=False,
                workflow_type="train",
                **settings,
                **local_settings(self.overrides, self.checkpoint),
            )
            workflow.initialize()
            parsed = workflow.parser.get_parsed_content
            self.trainer, self.evaluator = parsed("train#trainer"), parsed("validate#evaluator")
            self.cases, self.validation_cases = parsed("train#data_list"), parsed("validate#data_list")
            write_split(self.folder, self.output_dir / SPLIT_FILE, parsed("seed"), parsed("folds"))
            self.network = self.trainer.network
            self.network.frozen_trunk = not trains_encoder(self.network, self.strategy.roles)
        except Exception as error:
            raise first_of_ours(error) or PFedSAMError(
                ErrorCode.BUNDLE_FAILED,
                f"bundle '{self.bundle}' could not be started: {error}",
                "Try it alone: monai.bundle run.",
            ) from error

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
        load_shared_state(self.network, self.strategy.roles, theta)
        received = shared_state(self.network, self.strategy.roles)
        if any(not torch.equal(tensor, self._received.get(name, tensor + 1)) for name, tensor in received.items()):
            self._global_dice = None
        self._received = received

    def restore(self, model: SiteModel) -> None:
        """Take back the personal part, its optimiser's moments and what it has seen.

        Validation cases of patients that the model was trained on, in an earlier job with another split, are named in
        the log and left out: their Dice would be too high. To train on what was validated on before is fine, as nothing
        is measured on it any more.

        Raises:
            PFedSAMError: E08 if no validation case is left, E13 if tensors do not fit.
        """
        self._remember(model)
        own = {name: tensor for name, tensor in model.personal.items() if not name.startswith(COPY)}
        load_personal_state(self.network, self.strategy.roles, own)
        if model.copy:
            check_state(
                model.copy,
                manifest(self.network, self.strategy.roles, "shared"),
                code=ErrorCode.PERSONAL_STATE,
                what="own copy",
            )
        self._copy = model.copy
        self.trainer.load_moments(model.moments)

    def _remember(self, model: SiteModel) -> None:
        """Go on from what a saved model has seen."""
        known = Seen.of(model.info)
        if known is None:
            logger.warning("the saved model does not say which patients it was trained on")
        self._seen = known or Seen.nothing(whole=False)
        trained = [
            number
            for number, item in enumerate(self.validation_cases)
            if self._seen.section_of(patient_of(item)) == "training"
        ]
        if not trained:
            return
        if len(trained) == len(self.validation_cases):
            raise PFedSAMError(
                ErrorCode.WRONG_SPLIT,
                f"all {len(trained)} validation cases of '{self.folder}' are of patients that the saved model was "
                "trained on.",
                "Use the split that it was trained with (seed, datalist.json), or add cases.",
            )
        names = ", ".join(str(self.validation_cases[number].get("case")) for number in trained)
        logger.warning("validation without %d case(s) that the saved model was trained on: %s", len(trained), names)
        self.validation_cases = leave_out(self.evaluator, self.validation_cases, trained)
        self._global_dice = None

    def validate(self, experts: bool) -> dict[str, float]:
        """Mean Dice over the validation cases, as volumes, of the global (experts off) or the personal model.

        The personal part works beside theta as received, also after a phase that has trained theta. The global model's
        Dice is kept until another theta is received: NVFlare asks for the last one several times.
        """
        if experts or self._global_dice is None:
            reset(self.evaluator)
            answered: list[bool] = []
            with (
                self.network.experts(experts),
                swapped_parameters(self.network, self._beside() if experts else {}),
                self.evaluator.add_event_handler(
                    IterationEvents.FORWARD_COMPLETED,
                    lambda engine: answered.extend(map(self._is_answer, engine.state.output[Keys.PRED])),
                ),
            ):
                self.evaluator.run()
            dice = float(self.evaluator.state.metrics["val_dice"])
            if experts:
                return {"val_dice": dice}
            self._global_dice, self._answered = dice, answered
        return {"val_dice": self._global_dice}

    @property
    def answers(self) -> bool:
        """Whether the Dice of the global model validated last says how good it is, and not how large the lesions are.

        The Dice of a model that predicts everything is a function of the lesion's volume alone, and that of one that
        predicts nothing tells which cases have none. So at least half of the validation cases must have a class whose
        prediction covers between `LEAST_COVERED` and `MOST_COVERED` of the network's input. A model that was made to
        predict a fixed region of ordinary size is not found out.
        """
        return bool(self._answered) and 2 * sum(self._answered) >= len(self._answered)

    def _is_answer(self, logits: Tensor) -> bool:
        """Whether the logits `(C, ...)` of a case, not yet put back on its image, are an ordinary prediction."""
        if self.trainer.exclusive:
            found = torch.stack([logits.argmax(0) == number for number in range(1, len(logits))])
        else:
            found = logits > 0
        covered = found.flatten(1).float().mean(1)
        return bool(((covered >= LEAST_COVERED) & (covered <= MOST_COVERED)).any())

    def _beside(self) -> dict[str, Tensor]:
        """The tensors in the place of the shared ones in the personal model."""
        return self._copy or self._received

    def validates(self, round_number: int) -> bool:
        """Whether the strategy asks for a validation before the training of this round."""
        return (round_number + 1) % self.strategy.validate_every == 0

    def personal_dice(self, round_number: int) -> float | None:
        """Validation Dice of the personal model after the training of a round, None if the rounds train none or the
        strategy asks for no validation in this one.
        """
        if not (self.strategy.rounds_are_personal and self.validates(round_number)):
            return None
        return self.validate(experts=True)["val_dice"]

    def train(self, round_number: int) -> RoundResult:
        """One round beside the global model received last. If it fails or is stopped, the model is as before."""
        with self._all_or_nothing():
            result = self._run(self.strategy.phases, round_number)
        result.personal = self._personal()
        self._forget_global_dice()
        result.delta = {
            name: tensor - self._received[name]
            for name, tensor in shared_state(self.network, self.strategy.roles).items()
        }
        return result

    def finish(self, round_number: int) -> RoundResult:
        """The final personal phase beside the global model received last: nothing is to be sent.

        The personal model is then moved towards the global one, see `interpolation` of the strategy. If it fails or
        is stopped, the model is as before.
        """
        with self._all_or_nothing():
            result = self._run(self.strategy.final, round_number)
            self._interpolate(self.strategy.interpolation)
        result.personal = self._personal()
        self._forget_global_dice()
        return result

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """After an error or a stop inside, the personal part, copy, moments and theta are those of before.

        A round that ended in values that are not finite would spoil every round after it. The state on disk is that of
        the last whole round, and so is the one in memory.
        """
        personal, copy = personal_state(self.network, self.strategy.roles), self._copy
        # a phase makes new ones and changes none in place
        moments, theta, whole = self.trainer.moments(), self._received, False
        try:
            yield
            whole = not self.trainer.should_stop()
        finally:
            if not whole:
                load_personal_state(self.network, self.strategy.roles, personal)
                self._copy = copy
                self.trainer.load_moments(moments)
                if theta:
                    load_shared_state(self.network, self.strategy.roles, theta)

    def _interpolate(self, alpha: float) -> None:
        if alpha == 1:
            return
        for layer in self.network.expert_layers().values():
            layer.interpolate(alpha)
        self._copy = {name: self._received[name].lerp(own, alpha) for name, own in self._copy.items()}

    def _personal(self) -> dict[str, Tensor]:
        copies = {COPY + name: tensor for name, tensor in self._copy.items()}
        return {**personal_state(self.network, self.strategy.roles), **copies}

    def _forget_global_dice(self) -> None:
        """Personal tensors beside the experts also work with the experts off (as FedRep's head)."""
        if set(self.strategy.personal) - {"experts"}:
            self._global_dice = None

    def model(self, **info: Any) -> SiteModel:
        """The personal part with the shared part *as received*: the pair that was trained together."""
        seen = self._seen.add("validation", map(patient_of, self.validation_cases)).to_dict()
        about = {"bundle": self.bundle, "strategy": self.strategy.name, "overrides": dict(self.overrides or {})}
        told = {**about, SEEN: seen, **info}
        model = SiteModel.of(self.network, self.strategy.roles, **told)
        model.shared, model.moments = dict(self._received), self.trainer.moments()
        model.personal = self._personal()
        return model

    @contextmanager
    def _theta_of(self, phase: Phase) -> Iterator[None]:
        """A phase that trains personal tensors only does it beside theta *as received*, whatever ran before it.

        So the pair (theta, phi) that is kept is the one that was trained together, in either order of the phases. A
        phase that trains the site's copy of theta has the copy in the place of the shared tensors.
        """
        if "shared" in phase.trains or not self._received:
            yield
            return
        roles, own = self.strategy.roles, "copy" in phase.trains
        trained = shared_state(self.network, roles)
        load_shared_state(self.network, roles, self._beside() if own else self._received)
        try:
            yield
            if own:
                self._copy = shared_state(self.network, roles)
        finally:
            load_shared_state(self.network, roles, trained)

    def _run(self, phases: tuple[Phase, ...], round_number: int) -> RoundResult:
        result = RoundResult({}, {})
        self._seen = self._seen.add("training", map(patient_of, self.cases))
        for number, phase in enumerate(phases):
            for layer in self.network.expert_layers().values():
                layer.forget_usage()
            with self._theta_of(phase):
                frozen_this_round = self.strategy.frozen_this_round(round_number) if "shared" in phase.trains else ()
                roles, anchor = self.strategy.roles, self._received
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
