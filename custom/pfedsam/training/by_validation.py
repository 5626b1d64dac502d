"""What a site keeps after the final phase: found out on its validation cases, which no model was fitted to.

The final phase runs once, on all training patients. After some of its epochs the models between the global one and the
one at hand are compared with the global model on the validation cases, whole, as in every validation; so is the model
that the site would have by itself, if the strategy asks for it. See `pfedsam.training.serving.Serving`.

A cross-fit on training patients (`pfedsam.training.cross_fit`) has more patients to compare on, but the global model
was trained on all of them, and what is compared with it was not: it is for federations that a site has just joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ignite.engine import Events
from torch import Tensor

from pfedsam.parameters import load_personal_state, personal_state, shared_state, swapped_parameters
from pfedsam.training.choice import GLOBAL, Candidate, Choice, choose
from pfedsam.training.phase import Phase
from pfedsam.training.serving import Serving
from pfedsam.training.site_tensors import SiteTensors
from pfedsam.training.trainer import PhaseTrainer

#: The personal tensors and the site's copy of the shared ones, as they were at one moment.
Kept = tuple[dict[str, Tensor], dict[str, Tensor]]


class ByValidation:
    """Runs the final phase, compares on the way, and leaves what was chosen.

    Args:
        trainer, tensors: of the site.
        dice: Dice of each validation case of the network as it is, in the order of `patients`.
        patients: of the validation cases: several cases of one count as one.
    """

    def __init__(
        self,
        trainer: PhaseTrainer,
        tensors: SiteTensors,
        dice: Callable[[], Sequence[float]],
        patients: Sequence[str],
    ) -> None:
        self.trainer, self.tensors, self.dice, self.patients = trainer, tensors, dice, patients
        self.network = trainer.network
        self._kept: dict[tuple[int, bool], Kept] = {}

    def run(self, phase: Phase, serving: Serving, train: Callable[[Phase], object]) -> Choice:
        """Train, compare, and keep.

        Args:
            phase: the final phase.
            serving: what to compare.
            train: trains a phase from what is in the network.

        Returns:
            What was chosen; it is in the network and in the tensors, at its place between the global and the personal
            model. If the training was told to stop, the global model.
        """
        before, with_copy = self._personal(), "copy" in phase.trains
        base = self._of(0.0, False)
        gains: dict[Candidate, list[float]] = {}

        def compare(candidate: Candidate, with_copy: bool) -> None:
            found = self._of(candidate.alpha, with_copy)
            gains[candidate] = [found[patient] - base[patient] for patient in base]

        def on_the_way(engine: Any) -> None:
            if (epoch := engine.state.epoch) in serving.epochs:
                own = shared_state(self.network, self.tensors.roles) if with_copy else self.tensors.copy
                self._kept[epoch, False] = (personal_state(self.network, self.tensors.roles), own)
                for alpha in serving.alphas:
                    compare(Candidate(epoch, alpha), with_copy)

        with self.trainer.add_event_handler(Events.EPOCH_COMPLETED, on_the_way):
            train(phase.model_copy(update={"epochs": max(serving.epochs)}))
        if serving.alone and not self.trainer.should_stop():
            self._put(before)
            self.tensors.begin_alone()
            train(serving.alone)
            self._kept[serving.alone.epochs, True] = self._personal()
            with swapped_parameters(self.network, self.tensors.copy):
                compare(Candidate(serving.alone.epochs, 1.0, alone=True), True)
        if self.trainer.should_stop() or not gains:
            return choose({GLOBAL: [0.0]}, serving.margin)
        choice = choose(gains, serving.margin, serving.spread)
        kept = choice.candidate if choice.candidate.epochs else choice.best.candidate
        self._put(self._kept[kept.epochs, kept.alone])
        self.tensors.interpolate(choice.candidate.alpha)
        return choice

    def _personal(self) -> Kept:
        return personal_state(self.network, self.tensors.roles), self.tensors.copy

    def _put(self, kept: Kept) -> None:
        personal, self.tensors.copy = kept
        load_personal_state(self.network, self.tensors.roles, personal)

    def _of(self, alpha: float, with_copy: bool) -> Mapping[str, float]:
        """Dice by patient of a model between the global one and the one in the network."""
        training = self.network.training
        with self.network.experts(alpha > 0), self.tensors.nearer(alpha, with_copy):
            found = self.dice()
        self.network.train(training)
        by_patient: dict[str, list[float]] = {}
        for patient, dice in zip(self.patients, found, strict=True):
            by_patient.setdefault(patient, []).append(dice)
        return {patient: float(np.mean(values)) for patient, values in by_patient.items()}
