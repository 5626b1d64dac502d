"""What the training of a round gave: the tensors, and a report of each phase."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class PhaseReport:
    """What happened in a phase; every value is a number that may be listed as a scalar.

    Attributes:
        steps: optimiser steps.
        losses: loss of each step.
        teacher_passes: images that the teacher was run on.
        distilled_steps: steps with the extra loss.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    teacher_passes: int = 0
    distilled_steps: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss over the steps (NaN without a step)."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan


@dataclass
class RoundResult:
    """What a round gave: `delta` of the shared tensors, the trained `personal` ones, and a report of each phase.

    `gap` is how far the predictions have moved, where the strategy's `weights` ask for it, see `prediction_gap`.
    """

    delta: dict[str, Tensor]
    personal: dict[str, Tensor]
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    gates: dict[str, dict[str, float]] = field(default_factory=dict)
    gap: float | None = None
