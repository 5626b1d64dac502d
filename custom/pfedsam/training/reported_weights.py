"""Weights of the sites that follow from a number which each site reports: which number, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pfedsam.training.gap_weights import GapWeights
from pfedsam.training.site_weights import SiteWeights


class Weights(Protocol):
    """Weights that are kept from round to round."""

    def next(self, told: Mapping[str, float | None], progress: float, /) -> dict[str, float]:
        """The weights of a round, with mean 1, of what each site tells; None where it tells nothing."""


@dataclass(frozen=True)
class Reported:
    """A kind of weights.

    Attributes:
        note: the number of a site, as the history of a federation in one process names it.
        begin: makes the weights of a federation that begins.
    """

    note: str
    begin: Callable[[], Weights]


#: By the strategy's `weights`.
REPORTED: dict[str, Reported] = {"dro": Reported("val_dice_global", SiteWeights), "gaa": Reported("gap", GapWeights)}


class WeightsByReport:
    """The weights of a federation that follow from reports. At a server a resumed job begins anew."""

    def __init__(self) -> None:
        self._kept = {kind: reported.begin() for kind, reported in REPORTED.items()}

    def next(self, kind: str, told: Mapping[str, float | None], number: int, rounds: int) -> list[float]:
        """The weights of a round, in the order of the sites.

        Args:
            kind: a key of `REPORTED`.
            told: what each site that takes part has reported, None for nothing.
            number: of the round, counted from 0.
            rounds: of the whole federation.
        """
        return list(self._kept[kind].next(told, min(1.0, number / max(rounds, 1))).values())
