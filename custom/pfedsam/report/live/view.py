"""What the page about a run that goes on shows, read from the run's own records. It names sites, never cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

GLOBAL, PERSONAL = "global", "personal"


@dataclass(frozen=True)
class Point:
    """A Dice on the validation cases of a site.

    Attributes:
        site: its name.
        model: `global` or `personal`.
        rounds: behind the model.
        dice: mean over the cases and classes.
        final: of the personal model after the final phase.
    """

    site: str
    model: str
    rounds: int
    dice: float
    final: bool = False


@dataclass(frozen=True)
class Test:
    """Dice on the test cases: of each model and site by their names."""

    __test__ = False  # pytest takes the name for a test

    dice: Mapping[str, Mapping[str, float]]

    def means(self) -> dict[str, float | None]:
        """Of each model the mean over sites."""
        return {model: mean(sites.values()) for model, sites in self.dice.items()}


@dataclass
class Training:
    """A federation, or a run of a comparison.

    Attributes:
        name: for people.
        state: `waiting`, `running`, `done`, `failed` or `stopped`.
        now: what was told last.
        rounds, of: rounds done, in all.
        sites: names of the sites.
        points: the validations; of one moment the last counts.
        test: once it is tested.
    """

    name: str
    state: str
    now: str
    rounds: int
    of: int
    sites: Sequence[str]
    points: Sequence[Point] = ()
    test: Test | None = None

    def at(self, site: str, model: str, rounds: int, final: bool = False) -> float | None:
        """The Dice of a model of a site at a moment."""
        found = (p.dice for p in self.points if (p.site, p.model, p.rounds, p.final) == (site, model, rounds, final))
        return next(found, None)

    def last(self, site: str, model: str) -> float | None:
        """The newest Dice of a model of a site."""
        points = [p for p in self.points if (p.site, p.model) == (site, model)]
        return max(points, key=lambda p: (p.rounds, p.final)).dice if points else None

    def mean_at(self, model: str, rounds: int, final: bool = False) -> float | None:
        """Mean over the sites that have told a Dice at a moment."""
        return mean(self.at(site, model, rounds, final) for site in self.sites)

    def mean_last(self, model: str) -> float | None:
        """Mean over the sites of the newest Dice."""
        return mean(self.last(site, model) for site in self.sites)

    def moments(self) -> list[tuple[str, int, bool]]:
        """Model, rounds and whether it is the final phase: the rows of a table, in their order in time."""
        return sorted({(p.model, p.rounds, p.final) for p in self.points}, key=lambda row: (row[2], row[1], row[0]))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known, None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def newest(points: Iterable[Point]) -> list[Point]:
    """Of one site, model and moment the last point: a round that was stopped was done twice."""
    return list({(p.site, p.model, p.rounds, p.final): p for p in points}.values())
