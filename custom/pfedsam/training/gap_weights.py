"""Weights of the sites by how far local training moves the model's predictions: what the model lacks most counts most.

Generalisation-aware aggregation of FedSemiDG (arXiv 2501.07378), seen in its code: each round
`w_k <- w_k + gap_k / max gap * (0.05 / 3) * (1 - r / R)`, from 1 / K on whatever the numbers of cases. Ours: the gap
is rounded and capped, so that it may leave a site; a site that tells none counts as the mean of the others; and the
weights stay between a floor and a ceiling, so that a site that reports too large a gap gains at most twice an even
share. [ours]
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from pfedsam.training.site_weights import on_simplex

#: Of a weight in a round, where all weights together are 1.
STEP = 0.05 / 3
#: No gap that is told is larger; a smaller one than the least is told as 0.
LARGEST_GAP, LEAST_GAP = 1.0, 1e-6
#: Significant digits of a gap that is told.
GAP_DIGITS = 2


def rounded_gap(value: float) -> float | None:
    """A gap as it may leave a site: 0, or from `LEAST_GAP` to `LARGEST_GAP` with two digits.

    Args:
        value: mean divergence of a pixel, in nats.

    Returns:
        None for a value that is no finite number: then nothing is told.
    """
    if not isfinite(value):
        return None
    if value < LEAST_GAP:
        return 0.0
    return float(f"{min(value, LARGEST_GAP):.{GAP_DIGITS - 1}e}")


class GapWeights:
    """The weights of a federation, from round to round."""

    def __init__(self) -> None:
        self._kept: dict[str, float] = {}

    def next(self, told: Mapping[str, float | None], progress: float = 0.0) -> dict[str, float]:
        """The weights of a round.

        Args:
            told: the gap at each site that takes part; None where a site tells none: it counts as the mean of the
                others.
            progress: rounds done of all rounds, 0 to 1: the weights move less from round to round.

        Returns:
            Positive, their mean is 1. A site that was not there before starts with 1.
        """
        gaps = {site: rounded_gap(value) for site, value in told.items() if value is not None}
        known = [gap for gap in gaps.values() if gap is not None]
        largest, usual = max(known, default=0.0), sum(known) / max(len(known), 1)
        step = len(told) * STEP * max(0.0, 1 - progress)
        for site in told:
            gap = gaps.get(site)
            part = (usual if gap is None else gap) / largest if largest else 0.0
            self._kept[site] = self._kept.get(site, 1.0) + step * part
        sites = list(told)
        self._kept |= dict(zip(sites, on_simplex([self._kept[site] for site in sites]), strict=True))
        return {site: self._kept[site] for site in sites}
