"""How the sites' changes of the shared tensors become one: the reference in plain torch, for the server and in process.

One site must not own the mean. What a site sends is a claim: the number of its cases, and an update that nobody can
check against its images. The default, `norm_clipped`, bounds both by what the other sites of the round sent:

* cases: a site counts as at most `MOST_TIMES` times the lower median of the sites' numbers, or as at most the ceiling
  that the federation agreed on;
* length: an update is scaled down to at most `CLIP_TO` times the lower median of the updates' L2 norms, and left out if
  it is more than `ABSURD` times as long;
* direction: an update that points back (cosine below `OPPOSED`) is left out, the most opposed first. In the first round
  it is held against the sum of the others, each of length 1; later against the way that the model has come since,
  which honest sites follow further even where they pull against each other.

Always fewer than half are left out, and at least `KEPT` stay: of a mean of two each site could tell the other's update.
So of three sites none is left out; an update that would be is scaled down to the usual length.

`svd` and `alternate` judge updates in the same way, then treat LoRA's factors as their names say. `mean` takes every
claim as it is (FedAvg: McMahan et al., arXiv 1602.05629). The other rules ignore the numbers of cases: `trimmed_mean`
and `median` by coordinate (Yin et al., arXiv 1803.01498), `krum` takes the update that is closest to its neighbours
(Blanchard et al., NeurIPS 2017). Clipping of norms: Sun et al., arXiv 1911.07963. The bounds and the rule of
direction are ours. With two sites nobody can say which is wrong: the cases and the length are bounded, no more.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

A, B = ".lora_a", ".lora_b"

Rule = Literal["norm_clipped", "mean", "trimmed_mean", "median", "krum", "svd", "alternate"]
RULES: tuple[str, ...] = get_args(Rule)
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
#: Share of the sites that `trimmed_mean` leaves out on either side of each number, rounded, at least one of three.
TRIMMED = 0.2

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


def aggregate(
    theta: State,
    deltas: Sequence[State],
    weights: Sequence[float],
    how: str = "norm_clipped",
    start: State | None = None,
) -> dict[str, Tensor]:
    """The new theta: `theta + sum_k w_k delta_k`, w_k = n_k / n, for the rules that take a mean.

    Args:
        theta: shared tensors as sent.
        deltas: of each site, by the same names.
        weights: n_k of each site, positive.
        how: one of `RULES`.
        start: theta of the first round, None if this is the first.
    """
    change, _ = combine(theta, deltas, weights, how, start=start)
    return {name: (tensor.double() + change[name]).to(tensor.dtype) for name, tensor in theta.items()}


def combine(
    theta: State,
    deltas: Sequence[State],
    weights: Sequence[float],
    how: str,
    ceilings: Sequence[float | None] | None = None,
    start: State | None = None,
) -> tuple[dict[str, Tensor], list[Judgement]]:
    """The change of theta in double precision, and what became of each site's update.

    Args:
        theta, deltas, weights, how, start: as in `aggregate`.
        ceilings: agreed largest number of cases of each site, None where none was agreed on.

    Raises:
        ValueError: for an unknown rule, or no update.
    """
    if how not in RULES or not deltas:
        raise ValueError(f"rule {how!r} on {len(deltas)} updates, expected one of {RULES} on at least one")
    way = None if start is None else {name: tensor.double() - start[name].double() for name, tensor in theta.items()}
    judged = judge(deltas, weights, how, ceilings, way)
    if how in ("trimmed_mean", "median", "krum"):
        return _by_rank(theta, deltas, how), judged
    kept = [(_scaled(delta, one), one.counted) for delta, one in zip(deltas, judged, strict=True) if not one.left_out]
    change = _mean(theta, kept)
    if how == "svd":
        for a in [name for name in theta if name.endswith(A) and name.removesuffix(A) + B in theta]:
            b = a.removesuffix(A) + B
            factors = [(theta[a] + delta[a], theta[b] + delta[b]) for delta, _ in kept]
            for name, new in zip((a, b), refactored(factors, [weight for _, weight in kept]), strict=True):
                change[name] = new.double() - theta[name].double()
    return change, judged


def judge(
    deltas: Sequence[State],
    weights: Sequence[float],
    how: str = "norm_clipped",
    ceilings: Sequence[float | None] | None = None,
    way: State | None = None,
) -> list[Judgement]:
    """What each update counts as, see the module's text. Rules that do not judge only report the norms.

    Args:
        deltas, weights, how, ceilings: as in `combine`.
        way: theta minus theta of the first round, None in that one.
    """
    norms = [_norm(delta) for delta in deltas]
    if how == "krum":
        chosen = _krum(deltas)
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
    return _without_opposed(judged, deltas, way, usual) if len(deltas) > 2 else judged


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


def values_behind(how: str, count: int) -> int:
    """How many sites' values make a number of the result, of so many sites: few tell those of a single one."""
    if how in ("krum", "median"):
        return 1 if how == "krum" or count % 2 else 2
    return count - 2 * _cut(count) if how == "trimmed_mean" else count


def robust_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean without the smallest and the largest value, from three values on: one liar cannot move it far.

    It always lies between two values of others. `weights` are what `counted_cases` gives.
    """
    pairs = sorted(zip(values, weights, strict=True))
    if len(pairs) > 2:
        pairs = pairs[1:-1]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _without_opposed(
    judged: list[Judgement], deltas: Sequence[State], way: State | None, usual: float
) -> list[Judgement]:
    """Leave out updates that point back, one at a time, the most opposed first."""
    units = torch.stack([_unit(_flat(delta)) for delta in deltas])
    inside = [i for i, one in enumerate(judged) if not one.left_out]
    while True:
        cosines = {i: _cosine(units, i, [j for j in inside if j != i], way) for i in inside}
        judged = [replace(one, cosine=cosines.get(i, one.cosine)) for i, one in enumerate(judged)]
        worst = min(inside, key=cosines.__getitem__)
        if cosines[worst] >= OPPOSED:
            return judged
        if not _leave_out(judged, worst, usual, f"it points back: {cosines[worst]:.2f}"):
            return judged
        inside.remove(worst)


def _cosine(units: Tensor, one: int, others: list[int], way: State | None) -> float:
    """Cosine of one update to the way that the model has come, or, where it has come none, to the sum of the others."""
    towards = units[others].sum(dim=0) if way is None else _flat(way)
    return float(units[one] @ _unit(towards))


def _unit(vector: Tensor) -> Tensor:
    """The vector with length 1; one of length 0 stays as it is."""
    length = float(vector.norm())
    return vector / length if length else vector


def _by_rank(theta: State, deltas: Sequence[State], how: str) -> dict[str, Tensor]:
    if how == "krum":
        chosen = deltas[_krum(deltas)]
        return {name: chosen[name].double() for name in theta}
    count = len(deltas)
    cut = _cut(count)
    change = {}
    for name in theta:
        ranked = torch.stack([delta[name].double() for delta in deltas]).sort(dim=0).values
        middle = ranked[(count - 1) // 2 : count // 2 + 1] if how == "median" else ranked[cut : count - cut]
        change[name] = middle.mean(dim=0)
    return change


def _cut(count: int) -> int:
    """How many values `trimmed_mean` leaves out on either side."""
    return 0 if count < 3 else max(1, round(TRIMMED * count))


def _krum(deltas: Sequence[State]) -> int:
    """Place of the update whose nearest n - f - 2 others are closest, with f = 1 liar; at least one neighbour."""
    flat = torch.stack([_flat(delta) for delta in deltas])
    distances = torch.cdist(flat, flat).square()
    neighbours = max(1, len(deltas) - 3)
    # the nearest is the update itself, at distance 0
    scores = distances.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
    return int(scores.argmin())


def _mean(theta: State, kept: Sequence[tuple[State, float]]) -> dict[str, Tensor]:
    total = sum(weight for _, weight in kept)
    change = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in theta.items()}
    for delta, weight in kept:
        for name, sum_ in change.items():
            sum_ += delta[name].double() * (weight / total)
    return change


def _scaled(delta: State, one: Judgement) -> State:
    if one.clipped_to is None:
        return delta
    scale = one.clipped_to / one.norm
    return {name: (tensor.double() * scale).to(tensor.dtype) for name, tensor in delta.items()}


def _flat(delta: State) -> Tensor:
    return torch.cat([delta[name].double().flatten() for name in sorted(delta)])


def _norm(delta: State) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in delta.values()) ** 0.5)


def refactored(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors of rank r whose product is the best one to the weighted mean of the products `B_k A_k`.

    The mean of A times the mean of B is not the mean of the products; this is, up to rank r (Eckart and Young, 1936).
    The big product is never built: with the stacks `L = [w_k B_k]` and `R = [A_k]` a QR of each leaves a small matrix
    for the SVD. Both factors get the root of the singular values.

    Args:
        factors: `(A_k, B_k)` of each site, `(..., r, in)` and `(..., out, r)`.
        weights: n_k of each site.

    Returns:
        A and B in the shapes and dtypes given.
    """
    total = float(sum(weights))
    rank = factors[0][0].shape[-2]
    left = torch.cat([b.double() * (w / total) for (_, b), w in zip(factors, weights, strict=True)], dim=-1)
    right = torch.cat([a.double() for a, _ in factors], dim=-2)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = s[..., :rank].sqrt()
    b = q_left @ u[..., :rank] * root.unsqueeze(-2)
    a = root.unsqueeze(-1) * (vh[..., :rank, :] @ q_right.mT)
    first_a, first_b = factors[0]
    return a.to(first_a.dtype).contiguous(), b.to(first_b.dtype).contiguous()
