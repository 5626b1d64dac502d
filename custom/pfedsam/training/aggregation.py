"""How the sites' changes of the shared tensors become one: the reference in plain torch, for the server and in process.

The default, `norm_clipped`, is the weighted mean in which no site owns more than its share: each update counts as
`pfedsam.training.judgement` judges it by the others of its round. `svd` and `alternate` judge updates in the same way,
then treat LoRA's factors as their names say. `mean` takes every claim as it is (FedAvg: McMahan et al., arXiv
1602.05629). The other rules ignore the numbers of cases: `trimmed_mean` and `median` by coordinate (Yin et al., arXiv
1803.01498), `krum` takes the update that is closest to its neighbours (Blanchard et al., NeurIPS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pfedsam.training.judgement import Judgement, State, judge, krum

A, B = ".lora_a", ".lora_b"

Rule = Literal["norm_clipped", "mean", "trimmed_mean", "median", "krum", "svd", "alternate"]
RULES: tuple[str, ...] = get_args(Rule)
#: Share of the sites that `trimmed_mean` leaves out on either side of each number, rounded, at least one of three.
TRIMMED = 0.2


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
    kept = [(scaled(delta, one), one.counted) for delta, one in zip(deltas, judged, strict=True) if not one.left_out]
    change = _mean(theta, kept)
    if how == "svd":
        for a in [name for name in theta if name.endswith(A) and name.removesuffix(A) + B in theta]:
            b = a.removesuffix(A) + B
            factors = [(theta[a] + delta[a], theta[b] + delta[b]) for delta, _ in kept]
            for name, new in zip((a, b), refactored(factors, [weight for _, weight in kept]), strict=True):
                change[name] = new.double() - theta[name].double()
    return change, judged


def values_behind(how: str, count: int) -> int:
    """How many sites' values make a number of the result, of so many sites: few tell those of a single one."""
    if how in ("krum", "median"):
        return 1 if how == "krum" or count % 2 else 2
    return count - 2 * _cut(count) if how == "trimmed_mean" else count


def robust_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean without the smallest and the largest value, from three values on: one liar cannot move it far.

    It always lies between two values of others. `weights` are what `judgement.counted_cases` gives.
    """
    pairs = sorted(zip(values, weights, strict=True))
    if len(pairs) > 2:
        pairs = pairs[1:-1]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _by_rank(theta: State, deltas: Sequence[State], how: str) -> dict[str, Tensor]:
    if how == "krum":
        chosen = deltas[krum(deltas)]
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


def _mean(theta: State, kept: Sequence[tuple[State, float]]) -> dict[str, Tensor]:
    total = sum(weight for _, weight in kept)
    change = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in theta.items()}
    for delta, weight in kept:
        for name, sum_ in change.items():
            sum_ += delta[name].double() * (weight / total)
    return change


def scaled(delta: State, one: Judgement) -> State:
    """An update as it counts: scaled down where it was judged too long."""
    if one.clipped_to is None:
        return delta
    scale = one.clipped_to / one.norm
    return {name: (tensor.double() * scale).to(tensor.dtype) for name, tensor in delta.items()}


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
