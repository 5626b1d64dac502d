"""How the sites' changes of the shared tensors become one: the reference in plain torch.

NVFlare's own aggregator does `mean` on the server; `pfedsam.federated.aggregators` adds `svd` to it with the function
below. `alternate` needs no aggregator of its own: only one factor of each LoRA moves in a round, so the mean is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

A, B = ".lora_a", ".lora_b"


def aggregate(
    theta: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]], weights: Sequence[float], how: str = "mean"
) -> dict[str, Tensor]:
    """The new theta: `theta + sum_k w_k delta_k`, w_k = n_k / n (FedAvg: McMahan et al., arXiv 1602.05629).

    Args:
        theta: shared tensors as sent.
        deltas: of each site, by the same names.
        weights: n_k of each site, positive.
        how: `mean`, `alternate` (the same here) or `svd`, see `refactored`.
    """
    total = float(sum(weights))
    new = {}
    for name, tensor in theta.items():
        change = torch.zeros_like(tensor, dtype=torch.float64)
        for delta, weight in zip(deltas, weights, strict=True):
            change += delta[name].double() * (weight / total)
        new[name] = (tensor.double() + change).to(tensor.dtype)
    if how == "svd":
        for a in [name for name in theta if name.endswith(A) and name.removesuffix(A) + B in theta]:
            b = a.removesuffix(A) + B
            factors = [(theta[a] + delta[a], theta[b] + delta[b]) for delta in deltas]
            new[a], new[b] = refactored(factors, weights)
    return new


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
