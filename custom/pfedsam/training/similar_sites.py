"""Which sites are alike, by the directions of their updates: cosines, and groups by spectral clustering.

After SPP-FGC (arXiv 2511.10915), whose sites send private graphs. [ours]: the similarity is the cosine of the updates
that the server has in any case, so nothing more leaves a site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.linalg import qr
from torch import Tensor

#: A split into more groups than one needs an eigengap of so much: sites that have nothing in common form no groups.
LEAST_GAP = 0.1


def cosines(vectors: Sequence[Tensor]) -> Tensor:
    """Cosine of each two vectors, `(n, n)` in double precision; that of a zero vector is 0, and 1 to itself.

    Args:
        vectors: n vectors `(d,)`.
    """
    units = torch.stack([vector.double() for vector in vectors])
    units = units / units.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found = (units @ units.T).clamp(-1, 1)
    return found.fill_diagonal_(1.0)


def similar_groups(similarity: Tensor, groups: int = 0, most: int = 4, least_size: int = 1) -> list[list[int]]:
    """Groups of similar sites by spectral clustering.

    The affinity of two sites is their cosine, 0 where it is negative. Of the normalised affinity
    `D^-1/2 A D^-1/2` (Ng, Jordan and Weiss, NeurIPS 2001) the first eigenvectors place the sites; a pivoted QR finds
    one site for each group and the rotation that tells which group a site belongs to (Damle, Minden and Ying, arXiv
    1609.08251), so nothing is drawn at random. The number of groups is where the eigenvalues fall most; a gap below
    `LEAST_GAP` counts as none. [ours]

    Args:
        similarity: cosines `(n, n)`.
        groups: their number, or 0 to find it.
        most: at most so many are found.
        least_size: no more are looked for than n sites can form groups of this size.

    Returns:
        Places of the sites of each group, each site in one group; groups in the order of their first site.
    """
    count = len(similarity)
    affinity = similarity.clamp(min=0).fill_diagonal_(1.0)
    scale = affinity.sum(dim=1).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * affinity * scale[None, :])
    values, vectors = values.flip(0), vectors.flip(1)
    number = min(groups, count) if groups else _by_eigengap(values, min(most, count // max(least_size, 1)))
    if number < 2:
        return [list(range(count))]
    placed = vectors[:, :number]
    _, _, order = qr(placed.T.numpy(), mode="economic", pivoting=True)
    left, _, right = torch.linalg.svd(placed[torch.as_tensor(order[:number].copy()).long()].T)
    labels = (placed @ left @ right).abs().argmax(dim=1).tolist()
    found: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return list(found.values())


def _by_eigengap(values: Tensor, most: int) -> int:
    """How many of the eigenvalues, in falling order, come before the largest fall; 1 if that is no clear one."""
    if most < 2:
        return 1
    gaps = (values[:-1] - values[1:])[:most]
    largest = int(gaps.argmax())
    return largest + 1 if float(gaps[largest]) >= LEAST_GAP else 1
