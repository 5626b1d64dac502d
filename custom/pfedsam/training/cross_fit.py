"""What a site keeps after the final phase: found out by cross-fit on its own training patients.

The patients are dealt into folds. For each fold the final phase runs on the slices of the other patients. After some of
its epochs the models between the global one and the one at hand are compared with the global model, patient by patient,
on slices of the fold; so is the model that the site would have by itself, if the strategy asks for it. What is chosen
is one length of the phase and one place on the way, or the site's own model, or the global one where no gain stands out
from its standard error. Dice is over evenly spaced slices with the first variant of their augmentation: a comparison of
models on the same pictures, not a result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Events
from torch import Tensor
from torch.utils.data import DataLoader

from pfedsam.data.seen import patient_of
from pfedsam.data.slices import EpochSampler
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.parameters import load_personal_state, personal_state, swapped_parameters
from pfedsam.training.choice import GLOBAL, Candidate, Choice, choose
from pfedsam.training.phase import Phase
from pfedsam.training.serving import Serving
from pfedsam.training.site_tensors import SiteTensors
from pfedsam.training.trainer import PhaseTrainer

logger = logging.getLogger(__name__)

#: Slices of a patient on which models are compared, at most: with a label, and without.
POSITIVES, NEGATIVES = 8, 4


class CrossFit:
    """Runs the final phase fold by fold, and compares.

    Args:
        trainer, tensors: of the site.
        cases: the items of the training data, one a volume.
        seed: of the folds and the slices.

    Raises:
        PFedSAMError: E32 if the bundle draws its slices in a way of its own, or there are fewer than two patients.
    """

    def __init__(self, trainer: PhaseTrainer, tensors: SiteTensors, cases: Sequence[Any], seed: int) -> None:
        self.trainer, self.tensors, self.seed = trainer, tensors, seed
        self.network, self.loader = trainer.network, cast(DataLoader[Any], trainer.data_loader)
        self.patients = [patient_of(case) for case in cases]
        sampler = getattr(self.loader, "sampler", None)
        if not isinstance(sampler, EpochSampler) or len(sampler.take) != len(cases):
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                "the strategy's 'serving' cannot leave patients out: the bundle draws its slices in a way of its own.",
                "Use pfedsam.data.slices in the bundle, or a strategy without 'serving'.",
            )
        self.sampler, self.batch_size = sampler, self.loader.batch_size or 1
        if len(set(self.patients)) < 2:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                "the strategy's 'serving' compares models on patients left out, and there is one training patient.",
                "Add cases, or take a strategy without 'serving'.",
            )

    def run(self, phase: Phase, serving: Serving, train: Callable[[Phase], object]) -> Choice:
        """Find out what to keep.

        Args:
            phase: the final phase.
            serving: what to compare.
            train: trains a phase from what is in the network, as the final phase will be.
        """
        longest = phase.model_copy(update={"epochs": max(serving.epochs)})
        gains: dict[Candidate, list[float]] = {}
        folds = self._folds(serving.folds)
        for number, held in enumerate(folds, 1):
            slices = self._slices(held)
            base = self._dice(slices, 0.0, False)

            def compare(candidate: Candidate, with_copy: bool, slices: Any = slices, base: Any = base) -> None:
                found = self._dice(slices, candidate.alpha, with_copy)
                gains.setdefault(candidate, []).extend(found[patient] - base[patient] for patient in base)

            def on_the_way(engine: Any, compare: Any = compare) -> None:
                if engine.state.epoch in serving.epochs:
                    for alpha in serving.alphas:
                        compare(Candidate(engine.state.epoch, alpha), "copy" in phase.trains)

            with self._without([n for n, patient in enumerate(self.patients) if patient in held]):
                with self._afterwards_as_before(), self.trainer.add_event_handler(Events.EPOCH_COMPLETED, on_the_way):
                    train(longest)
                if serving.alone and not self.trainer.should_stop():
                    with self._afterwards_as_before():
                        self.tensors.begin_alone()
                        train(serving.alone)
                        with swapped_parameters(self.network, self.tensors.copy):
                            compare(Candidate(serving.alone.epochs, 1.0, alone=True), True)
            if self.trainer.should_stop():
                return choose({GLOBAL: [0.0]}, serving.margin)
            logger.info("cross-fit of the final phase: fold %d of %d", number, len(folds))
        return choose(gains, serving.margin, serving.spread)

    @contextmanager
    def _afterwards_as_before(self) -> Iterator[None]:
        """What a training inside changes of the personal model and its moments is taken back."""
        start, copy, moments = (
            personal_state(self.network, self.tensors.roles),
            self.tensors.copy,
            self.trainer.moments(),
        )
        try:
            yield
        finally:
            load_personal_state(self.network, self.tensors.roles, start)
            self.tensors.copy = copy
            self.trainer.load_moments(moments)

    def _folds(self, count: int) -> list[set[str]]:
        """The patients, dealt out in a seeded order."""
        names = sorted(set(self.patients))
        order = np.random.default_rng([self.seed, len(names)]).permutation(len(names))
        count = min(count, len(names))
        return [{names[i] for i in order[first::count]} for first in range(count)]

    def _slices(self, held: set[str]) -> dict[str, list[int]]:
        """Items of the dataset on which models are compared, by patient."""
        dataset, found = self.sampler.dataset, {}
        for patient in sorted(held):
            volumes = [n for n, one in enumerate(self.patients) if one == patient]
            positive = [item for n in volumes for item in dataset.positive[n]]
            negative = [item for n in volumes for item in dataset.negative[n]]
            chosen = _spread(positive, POSITIVES) + _spread(negative, NEGATIVES)
            found[patient] = [item * dataset.variants for item in chosen]
        return found

    @torch.no_grad()
    def _dice(self, slices: Mapping[str, Sequence[int]], alpha: float, with_copy: bool) -> dict[str, float]:
        """Dice of a model by patient, over all its slices together, mean over the classes.

        Args:
            slices: items of the dataset by patient.
            alpha: place between the global model and the personal one in the network.
            with_copy: the network has the site's copy in the place of the shared tensors.
        """
        training = self.network.training
        self.network.eval()
        try:
            with self.network.experts(alpha > 0), self.tensors.nearer(alpha, with_copy):
                return {patient: self._dice_of(items) for patient, items in slices.items()}
        finally:
            self.network.train(training)

    def _dice_of(self, items: Sequence[int]) -> float:
        counts = torch.zeros(2, 1, dtype=torch.float64)
        for first in range(0, len(items), self.batch_size):
            part = list(items[first : first + self.batch_size])
            batch = [self.sampler.dataset[item] for item in part]
            images = torch.stack([one["image"] for one in batch]).to(self.trainer.state.device)
            logits = self.trainer.logits(images, part).cpu()
            counts = counts + overlap(logits, torch.stack([one["label"] for one in batch]), self.trainer.exclusive)
        return dice_of(counts)

    @contextmanager
    def _without(self, volumes: Sequence[int]) -> Iterator[None]:
        """Train without some volumes meanwhile."""
        length = self.trainer.state.epoch_length
        self.sampler.leave_out(volumes)
        self.trainer.state.epoch_length = len(self.loader)
        try:
            yield
        finally:
            self.sampler.leave_out(())
            self.trainer.state.epoch_length = length


def overlap(logits: Tensor, label: Tensor, exclusive: bool) -> Tensor:
    """Twice the intersection, and the sum of both sizes, by class: `(2, C)` of `(B, C, H, W)`."""
    if exclusive:
        found = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1)[:, 1:].bool()
        truth = label[:, 1:] > 0.5
    else:
        found, truth = logits > 0, label > 0.5
    over = (0, 2, 3)
    return torch.stack([2 * (found & truth).sum(over), found.sum(over) + truth.sum(over)]).double()


def dice_of(counts: Tensor) -> float:
    """Mean Dice over the classes; a class that is neither there nor found counts as 1."""
    twice, sizes = counts
    return float(torch.where(sizes > 0, twice / sizes.clamp_min(1), torch.ones_like(sizes)).mean())


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most so many items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
