"""Units of the shared tensors, and how far a site's own unit has drifted from the global one.

A unit is one rank of a LoRA pair, a row of A with the column of B; where one factor alone is shared, its row or column;
of other tensors each as a whole. [ours]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pfedsam.training.aggregation import A, B

#: Tensors by name.
State = Mapping[str, Tensor]
#: A number of each unit: by the name of the pair or tensor, `(..., rank)` of LoRA and `()` of others.
ByUnit = dict[str, Tensor]


def unit_of(name: str) -> str:
    """The units that a tensor is a part of: those of its LoRA pair, else its own."""
    return name.removesuffix(A).removesuffix(B)


def over_units(name: str, value: Tensor) -> Tensor:
    """The numbers of a tensor's units in a shape that fits it: `(..., rank, 1)` for A, `(..., 1, rank)` for B."""
    if name.endswith(A):
        return value.unsqueeze(-1)
    return value.unsqueeze(-2) if name.endswith(B) else value


def summed(name: str, values: Tensor) -> Tensor:
    """Values of a tensor's shape summed over each unit: `(..., rank)` for A and B, `()` for others."""
    if name.endswith(A):
        return values.sum(-1)
    return values.sum(-2) if name.endswith(B) else values.sum()


def drift(own: State, received: State, start: State) -> ByUnit:
    """Of each unit `|c(own) - c(received)| / (|c(own)| + |c(received)|)`, 0 where neither has changed. [ours]

    c is the change since the start of a federation. Of a LoRA pair it is the matrix of rank one that the unit adds,
    `b a^T`, which is zero at the start, so that how a and b divide its size does not matter; of other tensors
    `theta - start`. By the triangle inequality it is from 0 to 1; of two changes at right angles and of one size 0.71.

    Args:
        own, received, start: shared tensors of the same names.
    """
    found: ByUnit = {}
    for unit, names in _by_unit(own).items():
        if len(names) > 1:  # of both factors the product: its inner product is that of a times that of b
            parts = [[_inner(name, one[name], other[name]) for one, other in _pairs(own, received)] for name in names]
            mine, theirs, both = (first * second for first, second in zip(*parts, strict=True))
        else:
            (name,) = names
            changes = [{name: state[name].double() - start[name].double()} for state in (own, received)]
            mine, theirs, both = (_inner(name, one[name], other[name]) for one, other in _pairs(*changes))
        distance = (mine + theirs - 2 * both).clamp_min(0).sqrt()
        sizes = mine.sqrt() + theirs.sqrt()
        found[unit] = torch.where(sizes > 0, distance / sizes.clamp_min(1e-300), torch.zeros_like(sizes)).clamp(0, 1)
    return found


def _by_unit(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unit_of(name), []).append(name)
    return found


def _pairs(own: State, received: State) -> tuple[tuple[State, State], ...]:
    return (own, own), (received, received), (own, received)


def _inner(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each unit of two tensors."""
    return summed(name, one.double() * other.double())
