"""What a site may keep after its final phase, and how it chooses by what its own patients say. [ours]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A model that a site could keep; without epochs the global one.

    Attributes:
        epochs: of the final phase, or of the phase alone.
        alpha: place between the global model (0) and the personal one (1).
        alone: the model that the site has by itself.
    """

    epochs: int = 0
    alpha: float = 0.0
    alone: bool = False

    @property
    def words(self) -> str:
        """For people."""
        if self.alone:
            return f"the site's own model, trained alone for {self.epochs} epoch(s)"
        return f"the personal model after {self.epochs} epoch(s), at {self.alpha:g} of the way from the global one"


GLOBAL = Candidate()


@dataclass(frozen=True)
class Compared:
    """A candidate with its gain: the mean over patients of Dice minus that of the global model.

    Attributes:
        candidate: the model.
        gain: 0 for the global one.
        error: standard error of the gain.
    """

    candidate: Candidate
    gain: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """For the state of a site."""
        return {
            "epochs": self.candidate.epochs,
            "alpha": self.candidate.alpha,
            "alone": self.candidate.alone,
            "gain": round(self.gain, 4),
            "error": round(self.error, 4),
        }


@dataclass(frozen=True)
class Choice:
    """What a site keeps, and why. It says how well models do on a site's patients: it stays at the site.

    Attributes:
        kept: with its gain.
        others: all candidates that were compared but the global one, the largest mean gain first.
        patients: their number.
    """

    kept: Compared
    others: tuple[Compared, ...]
    patients: int

    @property
    def candidate(self) -> Candidate:
        """What is kept."""
        return self.kept.candidate

    @property
    def best(self) -> Compared:
        """The candidate with the largest mean gain, also if it was not large enough."""
        return self.others[0]

    @property
    def sentence(self) -> str:
        """For people."""
        best = self.best
        told = f"{best.gain:+.3f} (standard error {best.error:.3f}) over {self.patients} patient(s) not trained on"
        if self.candidate.epochs:
            return f"kept: {best.candidate.words}; Dice {told}"
        return f"kept: the global model; the best other one, {best.candidate.words}, gains {told}"

    def confirmed(self, gain: float, cases: int) -> Choice:
        """The choice after a look at the validation cases: the global model, if both together gain nothing.

        Args:
            gain: mean Dice of the chosen model minus that of the global one over the validation cases.
            cases: their number.
        """
        together = (self.kept.gain * self.patients + gain * cases) / (self.patients + cases)
        return self if together > 0 else replace(self, kept=Compared(GLOBAL, 0.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """For the state of a site."""
        compared = [one.to_dict() for one in self.others]
        return {**self.kept.to_dict(), "patients": self.patients, "compared": compared}


def choose(gains: Mapping[Candidate, Sequence[float]], margin: float, spread: float = 0.0) -> Choice:
    """The candidate with the largest mean gain, if it is more than `margin` standard errors; else the global model.

    Of candidates of one gain the one nearest to the global model is taken.

    Args:
        gains: of each candidate, patient by patient.
        margin, spread: see `pfedsam.training.serving.Serving`.
    """
    known = [Compared(one, float(np.mean(values)), standard_error(values, spread)) for one, values in gains.items()]
    known.sort(key=lambda one: (-round(one.gain, 6), one.candidate.alone, one.candidate.alpha, one.candidate.epochs))
    best, patients = known[0], len(next(iter(gains.values())))
    stands_out = best.gain > 0 and best.gain > margin * best.error
    return Choice(best if stands_out else Compared(GLOBAL, 0.0, 0.0), tuple(known), patients)


def standard_error(values: Sequence[float], spread: float) -> float:
    """Of the mean of patients' gains.

    The standard deviation of few patients is itself known badly, and that of one not at all: what was expected
    before counts as much as one patient (the scale of a scaled inverse chi-squared prior with one degree of freedom).

    Args:
        values: gains of the patients.
        spread: standard deviation that is expected, 0 for no expectation: one value then says nothing.
    """
    count, prior = len(values), int(spread > 0)
    if count - 1 + prior == 0:
        return float("inf")
    squares = float(np.square(np.subtract(values, np.mean(values))).sum()) + spread**2
    return float((squares / (count - 1 + prior) / count) ** 0.5)
