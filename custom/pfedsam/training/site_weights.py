"""Weights of the sites that follow from how good the global model is at each: those where it is worst count most.

`min over theta, max over the simplex` of the weighted losses, as in DRFLM (arXiv 2204.07742): after each round
`lambda_k <- lambda_k exp(eta L_k)`, back on the simplex, with a floor. Ours: L_k is 1 minus the validation Dice of the
global model in steps of 0.01, which a site sends in any case, so nothing more leaves; eta is larger than their 0.1,
because a round here is many of their steps; and there is a ceiling, so that a site that reports a bad Dice gains at
most twice an even share. [ours]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

ETA, FLOOR, CEILING = 0.5, 0.05, 2.0
#: A Dice is told in steps of so many decimals.
DECIMALS = 2


class SiteWeights:
    """The weights of a federation, from round to round."""

    def __init__(self) -> None:
        self._kept: dict[str, float] = {}

    def next(self, dice: Mapping[str, float | None], progress: float = 0.0) -> dict[str, float]:
        """The weights of a round.

        Args:
            dice: of the global model that the round began with, at each site that takes part; None where a site tells
                none: it counts as the mean of the others.
            progress: rounds done of all rounds; here a step is the same in each.

        Returns:
            Positive, their mean is 1. A site that was not there before starts with 1.
        """
        losses = {site: 1 - round(value, DECIMALS) for site, value in dice.items() if value is not None}
        usual = sum(losses.values()) / max(len(losses), 1)
        for site in dice:
            self._kept[site] = self._kept.get(site, 1.0) * exp(ETA * (losses.get(site, usual) - usual))
        sites = list(dice)
        found = on_simplex([self._kept[site] for site in sites])
        self._kept |= dict(zip(sites, found, strict=True))
        return {site: self._kept[site] for site in sites}


def on_simplex(values: Sequence[float]) -> list[float]:
    """Positive values scaled to a mean of 1, none below the floor or above the ceiling.

    The floor is `FLOOR` of the whole, or half an even share where there are many; the ceiling `CEILING` even shares.
    """
    count = len(values)
    low, high = min(FLOOR * count, 0.5), max(CEILING, 1.0)
    # the one factor with which the values, held to their bounds, have the mean 1: their sum rises with it
    least, most = low / max(values), high / min(values)
    for _ in range(200):
        factor = (least + most) / 2
        found = [min(max(factor * value, low), high) for value in values]
        least, most = (least, factor) if sum(found) > count else (factor, most)
    return found
