"""The teacher of a phase: the network as the phase starts, and the loss that pulls the student to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import group_of, swapped_parameters
from pfedsam.training.distillation import QualityGate, TeacherLogits, distillation_loss
from pfedsam.training.extra_losses import Distillation


class Teacher:
    """What a phase learns from the network as it was when the phase started, see `Distillation`.

    Args:
        network: the student. The teacher shares all tensors with it but those that the phase trains: copies of them,
            as they are now, are kept.
        settings: of the phase.
        exclusive: softmax over the channels instead of a sigmoid of each.
        autocast: gives the context of the network's passes.

    Attributes:
        logits: of the teacher, by item and prompt.
    """

    def __init__(
        self,
        network: SegmentAnything,
        settings: Distillation,
        exclusive: bool,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.network, self.settings, self.exclusive, self.autocast = network, settings, exclusive, autocast
        self._personal = settings.teacher == "personal"
        self._gate = QualityGate(exclusive)
        self._as_it_was = {
            name: parameter.detach().clone()
            for name, parameter in network.named_parameters()
            if parameter.requires_grad and (self._personal or group_of(name) != "experts")
        }
        self.logits = TeacherLogits(self._teach)

    def __call__(self, features: Tensor, prediction: Tensor, label: Tensor, items: Sequence[int]) -> Tensor | None:
        """The loss of a batch; None while the teacher is worse than the student.

        Args:
            features: of the trunk, `(B, ...)`.
            prediction: the student's logits `(B, C, H, W)`.
            label: `(B, C, H, W)`, 0 or 1.
            items: index of each image in the data set.
        """
        with self.autocast():
            teacher = self.logits(features, items, self.network.boxes).float()
        if not self._gate.open(teacher, prediction.detach(), label) and self.settings.quality_gate:
            return None
        return distillation_loss(teacher, prediction, label, self.settings, self.exclusive)

    def _teach(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        training = self.network.training
        with (
            self.network.experts(self._personal),
            swapped_parameters(self.network, self._as_it_was),
            self.network.prompted(boxes),
        ):
            self.network.eval()
            logits = self.network.head(features)
        self.network.train(training)
        return logits
