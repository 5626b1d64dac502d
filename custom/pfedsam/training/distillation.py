"""Knowledge distillation between a global and a personal model, for sigmoid and for softmax outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsam.training.extra_losses import Distillation


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


def categorical_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`KL(softmax(z_T / tau) || softmax(z_S / tau))` of every pixel, for exclusive classes.

    Args:
        teacher: logits z_T, `(B, C, H, W)`.
        student: logits z_S, same shape.
        temperature: tau.

    Returns:
        `(B, 1, H, W)`, not negative.
    """
    t, s = F.log_softmax(teacher / temperature, 1), F.log_softmax(student / temperature, 1)
    return (t.exp() * (t - s)).sum(1, keepdim=True)


def foreground(logits: Tensor, exclusive: bool) -> Tensor:
    """Probabilities of the foreground classes: all channels, or those after the background if exclusive."""
    return logits.softmax(1)[:, 1:] if exclusive else logits.sigmoid()


def distillation_loss(
    teacher: Tensor, student: Tensor, label: Tensor, settings: Distillation, exclusive: bool = False
) -> Tensor:
    """`weight * tau^2 * mean KL` (Hinton et al., arXiv 1503.02531), the mean over the band and over the rest, 1:1.

    Args:
        teacher: logits `(B, C, H, W)`, without gradient.
        student: logits `(B, C, H, W)`.
        label: `(B, C, H, W)`, 0 or 1; with exclusive classes channel 0 is the background.
        settings: weight, temperature, band, and whether an image counts by what the teacher is worth on it.
        exclusive: softmax over the channels instead of a sigmoid of each.
    """
    divergence = (categorical_kl if exclusive else bernoulli_kl)(teacher, student, settings.temperature)
    if settings.by_image:
        divergence = divergence * worth(teacher, label, exclusive)[:, None, None, None]
    with torch.no_grad():
        likely = torch.maximum(foreground(teacher, exclusive), foreground(student, exclusive)) > settings.band
        band = likely | ((label[:, 1:] if exclusive else label) > 0.5)
        if exclusive:
            band = band.any(1, keepdim=True)
    # two means, not one: a lesion is a hundredth of the pixels, and one mean would teach the background alone
    means = [divergence[part].mean() for part in (band, ~band) if part.any()]
    return settings.weight * settings.temperature**2 * torch.stack(means).mean()


@torch.no_grad()
def worth(teacher: Tensor, label: Tensor, exclusive: bool = False) -> Tensor:
    """Soft Dice of the teacher on each image, all classes together: `(B,)` of logits and label `(B, C, H, W)`.

    One pixel is added to the overlap and to the size, so that a teacher that finds nothing where there is nothing is
    worth 1.
    """
    probability, label = foreground(teacher, exclusive), label[:, 1:] if exclusive else label
    over = (1, 2, 3)
    return (2 * (probability * label).sum(over) + 1) / (probability.sum(over) + label.sum(over) + 1)


#: An item and its prompt: None for no prompt, else the bytes of its row of boxes.
_Key = tuple[int, bytes | None]


class TeacherLogits:
    """Logits of the teacher by item and prompt, computed once and kept for one phase: in it the teacher is the same.

    Args:
        teacher: features `(B, ...)` and their boxes `(B, 4)`, or None for no prompt, to logits `(B, C, H, W)`.

    Attributes:
        passes: images that the teacher was run on.
    """

    def __init__(self, teacher: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.teacher = teacher
        self.passes = 0
        self._kept: dict[_Key, Tensor] = {}

    @torch.no_grad()
    def __call__(self, features: Tensor, items: Sequence[int], boxes: Tensor | None = None) -> Tensor:
        """Logits `(B, C, H, W)` for features `(B, ...)` of the given items.

        Args:
            features: of the frozen trunk.
            items: index of each image in the data set.
            boxes: `(B, 4)`, NaN for an image without a box, or None for no prompt (`SegmentAnything.prompted`).
        """
        # the boxes are part of the key: they are drawn anew each epoch, and the teacher sees what the student sees
        prompts = [None] * len(items) if boxes is None else [row.numpy().tobytes() for row in boxes.cpu()]
        keys = list(zip(items, prompts, strict=True))
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        if missing:
            self.passes += len(missing)
            taught = self.teacher(features[missing], None if boxes is None else boxes[missing])
            for i, logits in zip(missing, taught, strict=True):
                self._kept[keys[i]] = logits
        return torch.stack([self._kept[key] for key in keys])


class QualityGate:
    """Whether the teacher is at least as good as the student on the training slices seen in this phase (soft Dice)."""

    def __init__(self, exclusive: bool = False) -> None:
        self.exclusive = exclusive
        self._overlap = {"teacher": 0.0, "student": 0.0}
        self._size = {"teacher": 0.0, "student": 0.0}

    @torch.no_grad()
    def open(self, teacher: Tensor, student: Tensor, label: Tensor) -> bool:
        """Add a batch of logits `(B, C, H, W)` and tell whether to distil on it."""
        label = label[:, 1:] if self.exclusive else label
        for who, logits in (("teacher", teacher), ("student", student)):
            probability = foreground(logits.float(), self.exclusive)
            self._overlap[who] += float(2 * (probability * label).sum())
            self._size[who] += float(probability.sum() + label.sum())
        return self.dice("teacher") >= self.dice("student")

    def dice(self, who: str) -> float:
        """Soft Dice of `teacher` or `student` so far."""
        return self._overlap[who] / max(self._size[who], 1e-9)
