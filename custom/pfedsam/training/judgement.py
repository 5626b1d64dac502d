"""What each site's update counts as: one site must not own the mean.

What a site sends is a claim: the number of its cases, and an update that nobody can check against its images. The rules
in `JUDGING` bound both by what the other sites of the round sent:

* cases: a site counts as at most `MOST_TIMES` times the lower median of the sites' numbers, or as at most the ceiling
  that the federation agreed on;
* length: an update is scaled down to at most `CLIP_TO` times the lower median of the updates' L2 norms, and left out if
  it is more than `ABSURD` times as long;
* direction: an update that points back (cosine below `OPPOSED`) is left out, the most opposed first. In the first round
  it is held against the sum of the others, each of length 1; later against the way that the model has come since,
  which honest sites follow further even where they pull against each other.

Always fewer than half are left out, and at least `KEPT` stay: of a mean of two each site could tell the other's update.
So of three sites none is left out; an update that would be is scaled down to the usual length. With two sites nobody
can say which is wrong: the cases and the length are bounded, no more.

Clipping of norms: Sun et al., arXiv 1911.07963. The bounds and the rule of direction are ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Rules that judge each update by the others of its round.
JUDGING = ("norm_clipped", "svd", "alternate")
#: A site counts as at most so many times the lower median of the sites' numbers of cases.
MOST_TIMES = 3.0
#: An update is at most so many times as long as the lower median of the lengths.
CLIP_TO = 2.0
#: An update that is more than so many times as long is no honest one: it is left out.
ABSURD = 10.0
#: Cosine to the sum of the others below which an update is left out.
OPPOSED = -0.1
#: So many updates stay at least.
KEPT = 3

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Judgement:
    """What a round made of one site's update.

    Attributes:
        cases: the number that the site claims.
        counted: the number that it counts as in the mean; 0 if the update was left out. Of rules by rank 1, and of
            `krum` 1 for the update that was taken.
        norm: L2 norm of the update as it came.
        clipped_to: norm that it was scaled down to, or None.
        cosine: to the sum of the others, or None where it was not looked at.
        why: it was left out, or scaled down to the usual length, in words; "" if it was not.
    """

    cases: float
    counted: float
    norm: float
    clipped_to: float | None = None
    cosine: float | None = None
    why: str = ""

    @property
    def left_out(self) -> bool:
        """Whether the update is no part of the mean."""
        return not self.counted

    @property
    def changed(self) -> bool:
        """Whether the site counts for less than it claims."""
        return self.counted < self.cases or self.clipped_to is not None or bool(self.why)


def judge(
    deltas: Sequence[State],
    weights: Sequence[float],
    how: str = "norm_clipped",
    ceilings: Sequence[float | None] | None = None,
    way: State | None = None,
    groups: Sequence[tuple[Sequence[int], State | None]] | None = None,
) -> list[Judgement]:
    """What each update counts as, see the module's text. Rules that do not judge only report the norms.

    Args:
        deltas, weights, how, ceilings: as in `pfedsam.training.aggregation.combine`.
        way: theta minus theta of the first round, None in that one.
        groups: places of the sites of each group that has a theta of its own, and the way of that: directions are
            judged within a group. None: all sites are one. Without any, no direction is judged.
    """
    norms = [_norm(delta) for delta in deltas]
    if how == "krum":
        chosen = krum(deltas)
        return [Judgement(cases, float(i == chosen), norms[i]) for i, cases in enumerate(weights)]
    if how not in JUDGING:
        # where ranks decide, a claim of cases counts nothing
        return [
            Judgement(cases, cases if how == "mean" else 1.0, norm) for cases, norm in zip(weights, norms, strict=True)
        ]
    usual = statistics.median_low(norms)
    judged = [
        Judgement(cases, count, norm, CLIP_TO * usual if norm > CLIP_TO * usual > 0 else None)
        for cases, count, norm in zip(weights, counted_cases(weights, ceilings), norms, strict=True)
    ]
    for i in sorted(range(len(norms)), key=lambda i: -norms[i]):
        if norms[i] > ABSURD * usual > 0:
            _leave_out(judged, i, usual, f"more than {ABSURD:g} times as long as is usual")
    for members, its_way in [(range(len(deltas)), way)] if groups is None else groups:
        if len(members) > 2:
            found = _without_opposed([judged[i] for i in members], [deltas[i] for i in members], its_way, usual)
            for i, one in zip(members, found, strict=True):
                judged[i] = one
    return judged


def _leave_out(judged: list[Judgement], one: int, usual: float, why: str) -> bool:
    """Leave an update out if enough others stay, else scale it down to the usual length; whether it was left out."""
    left_out = 1 + sum(other.left_out for other in judged)
    if 2 * left_out < len(judged) and len(judged) - left_out >= KEPT:
        judged[one] = replace(judged[one], counted=0.0, clipped_to=None, why=why)
        return True
    judged[one] = replace(judged[one], clipped_to=min(usual, judged[one].norm), why=why)
    return False


def counted_cases(weights: Sequence[float], ceilings: Sequence[float | None] | None = None) -> list[float]:
    """What the numbers of cases count as.

    Args:
        weights: what each site claims.
        ceilings: what was agreed on for each site; with None a site is held to `MOST_TIMES` the lower median.
    """
    if not weights:
        return []
    usual = MOST_TIMES * statistics.median_low(weights)
    agreed = ceilings or [None] * len(weights)
    return [min(float(n), usual if most is None else most) for n, most in zip(weights, agreed, strict=True)]


def _without_opposed(
    judged: list[Judgement], deltas: Sequence[State], way: State | None, usual: float
) -> list[Judgement]:
    """Leave out updates that point back, one at a time, the most opposed first."""
    units = torch.stack([_unit(_flat(delta)) for delta in deltas])
    inside = [i for i, one in enumerate(judged) if not one.left_out]
    while inside:
        cosines = {i: _cosine(units, i, [j for j in inside if j != i], way) for i in inside}
        judged = [replace(one, cosine=cosines.get(i, one.cosine)) for i, one in enumerate(judged)]
        worst = min(inside, key=cosines.__getitem__)
        if cosines[worst] >= OPPOSED:
            return judged
        if not _leave_out(judged, worst, usual, f"it points back: {cosines[worst]:.2f}"):
            return judged
        inside.remove(worst)
    return judged


def _cosine(units: Tensor, one: int, others: list[int], way: State | None) -> float:
    """Cosine of one update to the way that the model has come, or, where it has come none, to the sum of the others."""
    towards = units[others].sum(dim=0) if way is None else _flat(way)
    return float(units[one] @ _unit(towards))


def _unit(vector: Tensor) -> Tensor:
    """The vector with length 1; one of length 0 stays as it is."""
    length = float(vector.norm())
    return vector / length if length else vector


def krum(deltas: Sequence[State]) -> int:
    """Place of the update whose nearest n - f - 2 others are closest, with f = 1 liar; at least one neighbour."""
    flat = torch.stack([_flat(delta) for delta in deltas])
    distances = torch.cdist(flat, flat).square()
    neighbours = max(1, len(deltas) - 3)
    # the nearest is the update itself, at distance 0
    scores = distances.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
    return int(scores.argmin())


def _flat(delta: State) -> Tensor:
    return torch.cat([delta[name].double().flatten() for name in sorted(delta)])


def _norm(delta: State) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in delta.values()) ** 0.5)
