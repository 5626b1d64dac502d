"""What each site serves after a run, and whether personalisation pays there, in plain words.

What a site chose for itself, and its gain there, say how well models do on its patients: they are told at the sites,
and outside of sites with enough patients only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from pfedsam.evaluation.site import MODELS
from pfedsam.report.warnings import ZERO
from pfedsam.storage.state_list import newest_states
from pfedsam.training.strategy import Strategy

STATES = "state"
_CONFIDENCE = 0.95
_PAYS, _COSTS, _UNCLEAR = "it pays", "it costs", "it cannot be told from chance"
#: What a site serves where the page does not tell it, and where the run keeps no record of it.
HIDDEN, UNKNOWN = "not shown: few patients", "not known: the run keeps no model of this site"


@dataclass(frozen=True)
class Gain:
    """Dice of the personal model minus that of the global one, paired over test cases.

    Attributes:
        mean: over the cases.
        low, high: ends of its 95 % interval (Student's t); None of one case.
        cases: their number.
    """

    mean: float
    low: float | None
    high: float | None
    cases: int

    @classmethod
    def of(cls, gains: Sequence[float]) -> Gain:
        """Of the gains of at least one case."""
        mean, count = float(np.mean(gains)), len(gains)
        if count < 2:
            return cls(mean, None, None, count)
        half = float(student.ppf((1 + _CONFIDENCE) / 2, count - 1) * np.std(gains, ddof=1) / count**0.5)
        return cls(mean, max(-1.0, mean - half), min(1.0, mean + half), count)

    @property
    def verdict(self) -> str:
        """Whether personalisation pays."""
        if self.low is None or self.high is None:
            return "one case says nothing"
        if max(abs(self.low), abs(self.high)) < ZERO:
            return "the same as the global model"
        if self.low > 0:
            return _PAYS
        return _COSTS if self.high < 0 else f"cannot be told from chance with {self.cases} cases"


@dataclass(frozen=True)
class SiteServing:
    """What is told of a site.

    Attributes:
        site: its name.
        serves: which model it keeps, in words.
        gain: of the personal model on its test cases; None where it is not shown.
    """

    site: str
    serves: str
    gain: Gain | None

    @property
    def line(self) -> str:
        """For the terminal."""
        if self.gain is None:
            return f"{self.site} serves {self.serves}"
        ends = "" if self.gain.low is None else f" (95 % interval {self.gain.low:+.3f} to {self.gain.high:+.3f})"
        return f"{self.site} serves {self.serves}; gain {self.gain.mean:+.3f}{ends}: {self.gain.verdict}"


def servings(run: Path, results: Mapping[str, Any], plan: Mapping[str, Any], least: int = 1) -> list[SiteServing]:
    """What each site of a run serves, and what it gains by that.

    Args:
        run: the run folder.
        results: of `pfedsam.evaluation.tables.results`, with its cases.
        plan: of the run's job; empty if there was none.
        least: what few cases or patients say is left out: fewer than so many.
    """
    infos = {
        site: entry.info for site, entry in newest_states(run / STATES, str(plan.get("federation") or run.name)).items()
    }
    strategy = Strategy.of(plan["strategy"]) if plan.get("strategy") else None
    gains = _gains(results)
    return [
        SiteServing(
            site,
            _serves(infos.get(site, {}), strategy, least),
            Gain.of(gains[site]) if len(gains.get(site, ())) >= least else None,
        )
        for site in results["sites"]
    ]


def advice(told: Sequence[SiteServing], results: Mapping[str, Any]) -> list[str]:
    """Whether personalisation pays in this federation, and when to expect a gain, in sentences."""
    gains = {one.site: one.gain for one in told if one.gain is not None}
    if not gains:
        return []
    said: dict[str, list[str]] = {}
    for site, gain in gains.items():
        key = gain.verdict if gain.verdict in (_PAYS, _COSTS) else _UNCLEAR
        said.setdefault(key, []).append(site)
    sites = "; ".join(f"{verdict} at {', '.join(names)}" for verdict, names in said.items())
    pooled = Gain.of([gain for site, ones in _gains(results).items() if site in gains for gain in ones])
    ends = "" if pooled.low is None else f", 95 % interval {pooled.low:+.3f} to {pooled.high:+.3f}"
    sentences = [
        f"Does personalisation pay here? Site by site: {sites}. Over all {pooled.cases} cases shown here the personal "
        f"models gain {pooled.mean:+.3f} Dice on the global one{ends}: {pooled.verdict}.",
        "Expect a gain where sites look or outline differently (other devices, other rules for annotators) and the "
        "global model has to lie between them. Expect none where all sites follow one protocol.",
    ]
    if _COSTS in said:
        sentences.append(
            f"At {', '.join(said[_COSTS])} use the global model: `pfedsam infer --global`. The strategy "
            "`longer_ft_chosen` lets each site choose on its own validation cases."
        )
    if _UNCLEAR in said:
        sentences.append(
            "Where it cannot be told from chance, more test cases narrow the interval, and until then the global model "
            "is the simpler choice. `pfedsam compare` with `pfedsam,longer_ft,fedavg_lora,local_only` tries the "
            "alternatives on your own data."
        )
    return sentences


def _gains(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Gain of each test case that both models were tested on, by site."""
    dice: dict[tuple[str, str], dict[str, float]] = {}
    for case in results["cases"]:
        dice.setdefault((case["site"], case["case"]), {})[case["model"]] = float(np.mean(case["dice"]))
    gains: dict[str, list[float]] = {}
    for (site, _), of in dice.items():
        if set(MODELS) <= set(of):
            gains.setdefault(site, []).append(of["personal"] - of["global"])
    return gains


def _serves(info: Mapping[str, Any], strategy: Strategy | None, least: int) -> str:
    """Which model a site keeps: by its own choice, else by its strategy."""
    chosen = info.get("served")
    if isinstance(chosen, Mapping):
        return _chosen(chosen) if chosen.get("patients", 0) >= least else HIDDEN
    if not info or strategy is None:
        return UNKNOWN
    if not strategy.roles.personal and not strategy.has_copy:
        return "the global model: its strategy keeps nothing personal"
    if strategy.final and info.get("final") is not True:
        return "the personal model, before its final phase"
    return f"the personal model{_place(strategy.interpolation)}"


def _chosen(chosen: Mapping[str, Any]) -> str:
    """What a site found out by itself, see `pfedsam.training.choice.Choice.to_dict`."""
    alpha, epochs = float(chosen.get("alpha", 0)), int(chosen.get("epochs", 0))
    if not epochs:
        return f"the global model, by its own choice on {chosen['patients']} patient(s)"
    which = f"its own model, trained alone for {epochs} epoch(s)"
    if not chosen.get("alone"):
        which = f"the personal model after {epochs} epoch(s){_place(alpha)}"
    gain, error = (float(chosen.get(key, float("nan"))) for key in ("gain", "error"))
    told = f"gain there {gain:+.3f}, standard error {error:.3f}"
    return f"{which}, by its own choice on {chosen['patients']} patient(s) ({told})"


def _place(alpha: float) -> str:
    return "" if alpha == 1 else f", at {alpha:g} of the way from the global one"
