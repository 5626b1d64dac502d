"""What a phase adds to its loss on labels, term by term. Each term is of its own module and is off unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pfedsam.data.known import settled, share_open
from pfedsam.networks.model import SegmentAnything
from pfedsam.training.alignment import StyleAdversary
from pfedsam.training.open_voxels import OpenVoxels
from pfedsam.training.phase import Phase
from pfedsam.training.smoothness import smoothness_loss
from pfedsam.training.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One step's data, and what the student made of it.

    Attributes:
        images: `(B, 3, H, W)` in [0, 1].
        features: of the trunk, `(B, ...)`, before their style was changed.
        prediction: logits `(B, C, H, W)`.
        label: `(B, C, H, W)` of 0, 1 and `OPEN`.
        items: index of each image in the data set.
        step: of the phase.
    """

    images: Tensor
    features: Tensor
    prediction: Tensor
    label: Tensor
    items: Sequence[int]
    step: int


class AddedLosses:
    """The terms of one phase in one round.

    Args:
        network: the student, as the phase starts.
        phase: which terms, with their settings.
        draw: number of the round and of the phase in it.
        loss: of the bundle.
        anchor: theta as received, for the proximal term.
        base: tensors of the SAM that no federation has trained.
        exclusive: softmax over the channels instead of a sigmoid of each.
        autocast: gives the context of the network's passes.

    Attributes:
        distilled_steps: steps in which the teacher was listened to.
    """

    def __init__(
        self,
        network: SegmentAnything,
        phase: Phase,
        draw: tuple[int, int],
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
        anchor: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        exclusive: bool,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.phase, self.exclusive, self.distilled_steps = phase, exclusive, 0
        trained = {name: one for name, one in network.named_parameters() if one.requires_grad}
        number, _ = draw
        distillation, pseudo = phase.distillation, phase.pseudo
        self.teacher = self.open = self.adversary = None
        if distillation and distillation.weight > 0 and number >= distillation.warmup_rounds:
            self.teacher = Teacher(network, distillation, exclusive, autocast)
        if pseudo and number >= pseudo.warmup_rounds:
            self.open = OpenVoxels(
                network, pseudo, trained, loss, exclusive=exclusive, draw=draw, base=base, autocast=autocast
            )
        if phase.adversary:
            self.adversary = StyleAdversary(network, phase.adversary, draw, autocast)
        self._anchors: list[tuple[nn.Parameter, Tensor]] = [
            (parameter, anchor[name].to(parameter.device))
            for name, parameter in trained.items()
            if phase.proximal and name in anchor
        ]

    def __call__(self, loss: Tensor, batch: Batch, balance: Tensor | None) -> Tensor:
        """The loss with all terms.

        Args:
            loss: on the labels.
            batch: what it is of.
            balance: load-balance loss of the experts, None if all experts count.
        """
        if self.open is not None:
            loss = loss + self.open(batch.features, batch.prediction, batch.label, batch.items)
        if self.phase.smooth is not None:
            loss = loss + self._smoothed(batch)
        if self.teacher is not None:
            distilled = self.teacher(batch.features, batch.prediction, settled(batch.label), batch.items)
            if distilled is not None:
                self.distilled_steps += 1
                loss = loss + distilled
        if balance is not None:
            loss = loss + self.phase.balance * balance
        if self._anchors:
            distance = torch.stack([(parameter - theta).square().sum() for parameter, theta in self._anchors]).sum()
            loss = loss + self.phase.proximal / 2 * distance
        if self.adversary is not None:
            loss = loss + self.adversary(batch.features, batch.images, batch.step)
        return loss

    def follow(self) -> None:
        """After an update of the student: what follows it, and what learns beside it."""
        if self.open is not None:
            self.open.follow()
        if self.adversary is not None:
            self.adversary.step()

    @property
    def unlabelled_share(self) -> float:
        """Slices of cases without a label that an epoch draws for each other slice."""
        return self.open.settings.share if self.open is not None else 0.0

    @property
    def teacher_passes(self) -> int:
        """Images that the teacher was run on."""
        return self.teacher.logits.passes if self.teacher is not None else 0

    def tell(self) -> None:
        """Write to the log what came of voxels without a label."""
        if self.open is not None and self.open.labelled:
            share = sum(self.open.labelled) / len(self.open.labelled)
            logger.info("phase '%s': %.0f %% of the voxels without a label got one", self.phase.name, 100 * share)

    def _smoothed(self, batch: Batch) -> Tensor | float:
        """The smoothness of the images that no label knows whole."""
        assert self.phase.smooth is not None
        chosen = share_open(batch.label) > 0
        if not bool(chosen.any()):
            return 0.0
        return smoothness_loss(batch.prediction[chosen], batch.images[chosen], self.phase.smooth, self.exclusive)
