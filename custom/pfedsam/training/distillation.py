"""Knowledge distillation between the global teacher and the personal student, for sigmoid outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsam.training.phases import Distillation


def bernoulli_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`KL(Bernoulli(sigmoid(z_T / tau)) || Bernoulli(sigmoid(z_S / tau)))` of every pixel.

    Args:
        teacher: logits z_T.
        student: logits z_S, same shape.
        temperature: tau.

    Returns:
        a tensor of the same shape, not negative.
    """
    t, s = teacher / temperature, student / temperature
    p = torch.sigmoid(t)
    return p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))


def distillation_loss(teacher: Tensor, student: Tensor, label: Tensor, settings: Distillation) -> Tensor:
    """`weight * tau^2 * mean KL`, the mean over the band and over the rest separately, 1:1 (METHOD.md).

    Args:
        teacher: logits `(B, C, H, W)`, without gradient.
        student: logits `(B, C, H, W)`.
        label: `(B, C, H, W)`, 0 or 1.
        settings: weight, temperature, band.
    """
    divergence = bernoulli_kl(teacher, student, settings.temperature)
    with torch.no_grad():
        likely = torch.maximum(torch.sigmoid(teacher), torch.sigmoid(student)) > settings.band
        band = likely | (label > 0.5)
    means = [divergence[part].mean() for part in (band, ~band) if part.any()]
    return settings.weight * settings.temperature**2 * torch.stack(means).mean()


class TeacherLogits:
    """Logits of the teacher by item, computed once and kept for one phase: in it the teacher does not change."""

    def __init__(self, teacher: Callable[[Tensor], Tensor]) -> None:
        self.teacher = teacher
        self.passes = 0
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, features: Tensor, items: Sequence[int]) -> Tensor:
        """Logits `(B, C, H, W)` for features `(B, ...)` of the given items."""
        missing = [i for i, item in enumerate(items) if item not in self._kept]
        if missing:
            self.passes += len(missing)
            for i, logits in zip(missing, self.teacher(features[missing]), strict=True):
                self._kept[items[i]] = logits
        return torch.stack([self._kept[item] for item in items])


class QualityGate:
    """Whether the teacher is at least as good as the student on the training slices seen in this phase (soft Dice)."""

    def __init__(self) -> None:
        self._overlap = {"teacher": 0.0, "student": 0.0}
        self._size = {"teacher": 0.0, "student": 0.0}

    @torch.no_grad()
    def open(self, teacher: Tensor, student: Tensor, label: Tensor) -> bool:
        """Add a batch of logits `(B, C, H, W)` and tell whether to distil on it."""
        for who, logits in (("teacher", teacher), ("student", student)):
            probability = torch.sigmoid(logits.float())
            self._overlap[who] += float(2 * (probability * label).sum())
            self._size[who] += float(probability.sum() + label.sum())
        return self.dice("teacher") >= self.dice("student")

    def dice(self, who: str) -> float:
        """Soft Dice of `teacher` or `student` so far."""
        return self._overlap[who] / max(self._size[who], 1e-9)
