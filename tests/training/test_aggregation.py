"""Aggregation against dense references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsam.strategies import find_strategy
from pfedsam.training.aggregation import aggregate, refactored


def sites(count: int, rank: int = 4, seed: int = 0) -> tuple[dict, list[dict], list[float]]:
    random = torch.Generator().manual_seed(seed)

    def one(scale: float) -> dict[str, torch.Tensor]:
        shapes = {"block.lora_a": (2, rank, 12), "block.lora_b": (2, 9, rank), "decoder.weight": (5, 3)}
        return {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}

    return one(1.0), [one(0.3) for _ in range(count)], [float(3 * k + 1) for k in range(count)]


def mean_of_products(theta: dict, deltas: list[dict], weights: list[float]) -> torch.Tensor:
    total = sum(weights)
    return sum(
        w
        / total
        * (theta["block.lora_b"] + d["block.lora_b"]).double()
        @ (theta["block.lora_a"] + d["block.lora_a"]).double()
        for d, w in zip(deltas, weights, strict=True)
    )


def test_mean_is_the_weighted_mean_of_what_the_sites_have() -> None:
    theta, deltas, weights = sites(3)
    new = aggregate(theta, deltas, weights)
    for name, tensor in theta.items():
        states = torch.stack([tensor + delta[name] for delta in deltas]).double()
        wanted = torch.einsum("k,k...->...", torch.tensor(weights, dtype=torch.float64), states) / sum(weights)
        torch.testing.assert_close(new[name].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_svd_is_the_best_factors_of_the_mean_of_the_products(count: int) -> None:
    theta, deltas, weights = sites(count)
    new = aggregate(theta, deltas, weights, "svd")
    dense = mean_of_products(theta, deltas, weights)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = u[..., :4] * s[..., None, :4] @ vh[..., :4, :]
    got = new["block.lora_b"].double() @ new["block.lora_a"].double()
    torch.testing.assert_close(got, best, rtol=0, atol=1e-5)
    mean = aggregate(theta, deltas, weights)
    torch.testing.assert_close(new["decoder.weight"], mean["decoder.weight"])
    if count > 1:
        by_mean = mean["block.lora_b"].double() @ mean["block.lora_a"].double()
        assert (got - dense).norm() < (by_mean - dense).norm()


@pytest.mark.parametrize("moving", ["lora_a", "lora_b"])
def test_alternate_is_exact_because_one_factor_moves(moving: str) -> None:
    theta, deltas, weights = sites(3)
    for delta in deltas:
        for name in delta:
            if "lora" in name and not name.endswith(moving):
                delta[name].zero_()
    new = aggregate(theta, deltas, weights, "alternate")
    got = new["block.lora_b"].double() @ new["block.lora_a"].double()
    torch.testing.assert_close(got, mean_of_products(theta, deltas, weights), rtol=0, atol=1e-6)


def test_with_one_a_for_all_and_only_b_averaged_the_product_is_the_mean_of_the_products() -> None:
    """ffa_lora: A is frozen, so it is no part of theta."""
    theta, deltas, weights = sites(3)
    a = theta.pop("block.lora_a").double()
    assert find_strategy("ffa_lora").checked().roles.of("block.lora_a") == "frozen"
    for delta in deltas:
        del delta["block.lora_a"]
    products = [(theta["block.lora_b"] + delta["block.lora_b"]).double() @ a for delta in deltas]
    wanted = sum(w * product for w, product in zip(weights, products, strict=True)) / sum(weights)
    got = aggregate(theta, deltas, weights)["block.lora_b"].double() @ a
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_mean_of_both_factors_is_not_the_mean_of_the_products() -> None:
    theta, deltas, weights = sites(3)
    new = aggregate(theta, deltas, weights)
    got = new["block.lora_b"].double() @ new["block.lora_a"].double()
    assert (got - mean_of_products(theta, deltas, weights)).abs().max() > 1e-2


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_svd_keeps_shapes_and_is_exact_up_to_the_rank(count: int, rank: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 7, generator=random)
    factors = [(a, torch.randn(8, rank, generator=random)) for _ in range(count)]
    new_a, new_b = refactored(factors, [1.0] * count)
    assert new_a.shape == (rank, 7)
    assert new_b.shape == (8, rank)
    wanted = sum(b @ one for one, b in factors) / count  # one A for all: the mean has rank r
    torch.testing.assert_close(new_b @ new_a, wanted, rtol=0, atol=1e-4)
