"""Losses on a prediction and its image: it may change where the image does. They need no label."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsam.training.distillation import foreground
from pfedsam.training.extra_losses import Smoothness

#: How often a prediction is carried on to its neighbours for the affinity loss.
_STEPS = 5


def smoothness_loss(prediction: Tensor, images: Tensor, settings: Smoothness, exclusive: bool = False) -> Tensor:
    """The losses of `Smoothness`, weighed and added.

    Args:
        prediction: logits `(B, C, H, W)`.
        images: `(B, 3, H, W)`, in [0, 1].
        settings: weights and kernel.
        exclusive: softmax over the channels instead of a sigmoid of each.
    """
    probability = foreground(prediction, exclusive)
    loss = prediction.new_zeros(())
    if settings.weight:
        loss = loss + settings.weight * gated_crf(probability, images, settings)
    if settings.affinity:
        carried = carried_along(probability.detach(), images, settings)
        loss = loss + settings.affinity * (probability - carried).abs().mean()
    return loss


def gated_crf(probability: Tensor, images: Tensor, settings: Smoothness) -> Tensor:
    """Mean over pixels and classes of `sum_j k_ij (p_i (1 - p_j) + (1 - p_i) p_j) / sum_j k_ij`.

    A field of one class has none (Potts model, Obukhov et al., arXiv 1906.04651). That the kernel of a pixel sums to 1,
    so that the weight does not depend on the radius, is ours. [ours]

    Args:
        probability: `(B, C, H, W)`.
        images: `(B, 3, H, W)`.
        settings: the kernel.
    """
    energy, total = torch.zeros_like(probability), torch.zeros_like(probability[:, :1])
    for kernel, other in _neighbours(probability, images, settings):
        energy = energy + kernel * (probability * (1 - other) + (1 - probability) * other)
        total = total + kernel
    return (energy / total.clamp_min(1e-6)).mean()


@torch.no_grad()
def carried_along(probability: Tensor, images: Tensor, settings: Smoothness) -> Tensor:
    """A prediction of which each pixel takes the mean of the neighbours that look like it, some times over.

    Args:
        probability, images, settings: as in `gated_crf`.
    """
    for _ in range(_STEPS):
        mean, total = probability.clone(), torch.ones_like(probability[:, :1])
        for kernel, other in _neighbours(probability, images, settings):
            mean += kernel * other
            total += kernel
        probability = mean / total
    return probability


def _neighbours(probability: Tensor, images: Tensor, settings: Smoothness) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each place in the neighbourhood the kernel `(B, 1, H, W)`, 0 beyond the edge, and the probability there."""
    reach = settings.radius
    around = [F.pad(one, [reach] * 4) for one in (probability, images, torch.ones_like(images[:, :1]))]
    height, width = probability.shape[-2:]
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            if not x and not y:
                continue
            rows, columns = slice(reach + y, reach + y + height), slice(reach + x, reach + x + width)
            other, image, inside = (one[..., rows, columns] for one in around)
            apart = (images - image).square().sum(1, keepdim=True) / (2 * settings.rgb**2)
            kernel = torch.exp(-apart - (x * x + y * y) / (2 * settings.xy**2)) * inside
            yield kernel, other
