"""Metrics of one case: MONAI's, with a rule for what MONAI leaves open, an empty label or prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from torch import Tensor

#: Tolerance of the surface Dice, in the unit of the spacing.
TOLERANCE = 2.0


@dataclass(frozen=True)
class CaseMetrics:
    """Metrics of one case, one value for each class.

    Attributes:
        dice: volumetric Dice, 0 to 1.
        hd95: 95th percentile of the symmetric Hausdorff distance, in the unit of the spacing.
        asd: average symmetric surface distance, in the unit of the spacing.
        nsd: surface Dice at `TOLERANCE` (Nikolov et al., arXiv 1809.04430), 0 to 1.
        failed: the class is in the label and not in the prediction. Distances are then the image's diagonal.
    """

    dice: tuple[float, ...]
    hd95: tuple[float, ...]
    asd: tuple[float, ...]
    nsd: tuple[float, ...]
    failed: tuple[bool, ...]


def case_metrics(prediction: Tensor, label: Tensor, spacing: Sequence[float] | None = None) -> CaseMetrics:
    """Metrics of a prediction against its label.

    A class that is empty in both is right: Dice and surface Dice 1, distances 0. A class that is empty in one only gets
    Dice and surface Dice 0 and the image's diagonal as both distances, so that a failure costs and never disappears.

    Args:
        prediction: binary `(C, H, W, D)` or `(C, H, W)`.
        label: the same shape.
        spacing: of a voxel along each spatial axis, by default 1.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} have different shapes")
    prediction, label = (torch.as_tensor(mask).bool().cpu() for mask in (prediction, label))
    spacing = [1.0] * (label.ndim - 1) if spacing is None else [float(size) for size in spacing]
    dice = compute_dice(prediction[None], label[None], ignore_empty=False)[0].tolist()
    surfaces = [_surfaces(p, y, spacing) for p, y in zip(prediction, label, strict=True)]
    failed = (label.flatten(1).any(1) & ~prediction.flatten(1).any(1)).tolist()
    hd95, asd, nsd = zip(*surfaces, strict=True)
    return CaseMetrics(tuple(dice), hd95, asd, nsd, tuple(failed))


def _surfaces(prediction: Tensor, label: Tensor, spacing: list[float]) -> tuple[float, float, float]:
    """HD95, ASD and surface Dice of one class."""
    if not prediction.any() and not label.any():
        return 0.0, 0.0, 1.0
    if not prediction.any() or not label.any():
        diagonal = float(np.linalg.norm(np.asarray(label.shape) * spacing))
        return diagonal, diagonal, 0.0
    # only the box around both matters, with a margin so that no surface lies on its border by the crop alone
    where = torch.nonzero(prediction | label)
    low, high = where.amin(0), where.amax(0) + 1
    box = tuple(slice(max(int(a) - 1, 0), min(int(b) + 1, n)) for a, b, n in zip(low, high, label.shape, strict=True))
    p, y = prediction[box][None, None].float(), label[box][None, None].float()
    common: dict[str, Any] = {"include_background": True, "spacing": spacing}
    hd95 = compute_hausdorff_distance(p, y, percentile=95, **common)
    asd = compute_average_surface_distance(p, y, symmetric=True, **common)
    nsd = compute_surface_dice(p, y, class_thresholds=[TOLERANCE], **common)
    return float(hd95), float(asd), float(nsd)
