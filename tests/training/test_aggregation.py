"""Aggregation against dense references, and what one hostile site of a few can do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from pfedsam.training.aggregation import RULES, aggregate, combine, refactored, robust_mean
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.judgement import ABSURD, CLIP_TO, MOST_TIMES, counted_cases, judge


def sites(count: int, rank: int = 4, seed: int = 0) -> tuple[dict, list[dict], list[float]]:
    random = torch.Generator().manual_seed(seed)

    def one(scale: float) -> dict[str, torch.Tensor]:
        shapes = {"block.lora_a": (2, rank, 12), "block.lora_b": (2, 9, rank), "decoder.weight": (5, 3)}
        return {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}

    # what the sites learn has a part in common
    theta, common = one(1.0), one(0.3)
    deltas = [{name: common[name] + tensor for name, tensor in one(0.3).items()} for _ in range(count)]
    return theta, deltas, [float(k + 2) for k in range(count)]


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
    new = aggregate(theta, deltas, weights, "mean")
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
    mean = aggregate(theta, deltas, weights, "mean")
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
    got = aggregate(theta, deltas, weights, "mean")["block.lora_b"].double() @ a
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_mean_of_both_factors_is_not_the_mean_of_the_products() -> None:
    theta, deltas, weights = sites(3)
    new = aggregate(theta, deltas, weights, "mean")
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


def flat(state: dict) -> torch.Tensor:
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def scaled(state: dict, factor: float) -> dict:
    return {name: factor * tensor for name, tensor in state.items()}


def test_sites_that_are_alike_are_averaged_as_they_are() -> None:
    theta, deltas, weights = sites(4)
    wanted = aggregate(theta, deltas, weights, "mean")
    for name, tensor in aggregate(theta, deltas, weights).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)
    assert not any(one.changed for one in judge(deltas, weights))


def test_a_site_counts_as_a_few_times_what_is_usual_and_no_more() -> None:
    assert counted_cases([5, 5, 1e6, 6]) == [5, 5, MOST_TIMES * 5, 6]
    assert counted_cases([1e6, 30]) == [MOST_TIMES * 30, 30], "of two the smaller is what is usual"
    assert counted_cases([5, 5, 400, 6], [None, None, 300, None]) == [5, 5, 300, 6], "as was agreed on"
    assert counted_cases([5, 5, 400, 6], [10, 10, 1000, 10]) == [5, 5, 400, 6]
    assert counted_cases([]) == []


def test_a_long_update_is_clipped_and_an_absurd_one_is_left_out() -> None:
    theta, deltas, _ = sites(4)
    usual = sorted(float(flat(delta).norm()) for delta in deltas)
    deltas[1] = scaled(deltas[1], 4)
    change, judged = combine(theta, deltas, [5.0] * 4, "norm_clipped")
    length = CLIP_TO * sorted(one.norm for one in judged)[1]
    assert judged[1].clipped_to == pytest.approx(length)
    assert length <= CLIP_TO * usual[2]
    wanted = (flat(deltas[0]) + flat(deltas[2]) + flat(deltas[3]) + flat(deltas[1]) * length / judged[1].norm) / 4
    torch.testing.assert_close(flat(change), wanted, rtol=0, atol=1e-7)
    deltas[1] = scaled(deltas[1], 1000)
    change, judged = combine(theta, deltas, [5.0, 1e6, 5, 5], "norm_clipped")
    assert judged[1].left_out
    assert str(int(ABSURD)) in judged[1].why
    torch.testing.assert_close(
        flat(change), (flat(deltas[0]) + flat(deltas[2]) + flat(deltas[3])) / 3, rtol=0, atol=1e-7
    )


def test_where_most_send_nothing_the_others_are_not_scaled_to_nothing() -> None:
    theta, deltas, _ = sites(3)
    change, judged = combine(theta, [scaled(deltas[0], 0), scaled(deltas[1], 0), deltas[2]], [1.0] * 3, "norm_clipped")
    assert not any(one.changed for one in judged)
    torch.testing.assert_close(flat(change), flat(deltas[2]) / 3)


@given(st.integers(2, 6), st.floats(-1e4, 1e4), st.sampled_from([1.0, 7.0, 1e6]), st.integers(0, 30), st.booleans())
@settings(max_examples=80, deadline=None)
def test_one_site_moves_the_mean_by_a_bounded_length(
    count: int, scale: float, cases: float, seed: int, random: bool
) -> None:
    """Whatever it sends: no more than its share of twice what is usual, and its share is no more than that of three."""
    theta, deltas, _ = sites(count, seed=seed)
    liar = sites(1, seed=seed + 100)[1][0] if random else deltas[0]
    told = [scaled(liar, scale), *deltas[1:]]
    honest = max(float(flat(delta).norm()) for delta in deltas[1:])
    change, judged = combine(theta, told, [cases, *[5.0] * (count - 1)], "norm_clipped")
    share = MOST_TIMES / (MOST_TIMES + count - 1)
    limit = share * CLIP_TO * honest + honest
    assert float(flat(change).norm()) <= limit * (1 + 1e-6)
    assert judged[0].counted <= MOST_TIMES * max(5.0, min(cases, 5.0))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_rules_by_coordinate_are_numpys_and_scipys(count: int) -> None:
    theta, deltas, weights = sites(count)
    stacked = {name: np.stack([delta[name].numpy() for delta in deltas]) for name in theta}
    median, trimmed = (combine(theta, deltas, weights, how)[0] for how in ("median", "trimmed_mean"))
    cut = 0 if count < 3 else max(1, round(0.2 * count))
    for name, values in stacked.items():
        np.testing.assert_allclose(median[name].numpy(), np.median(values, axis=0), atol=1e-6)
        np.testing.assert_allclose(trimmed[name].numpy(), trim_mean(values, cut / count + 1e-9, axis=0), atol=1e-6)


def test_krum_takes_one_of_those_that_lie_together() -> None:
    theta, deltas, weights = sites(5)
    near = [{name: deltas[0][name] + 0.01 * delta[name] for name in theta} for delta in deltas]
    near[2] = scaled(near[2], 50)
    change, _ = combine(theta, near, weights, "krum")
    found = [torch.equal(flat(change), flat(one)) for one in near]
    assert sum(found) == 1
    assert not found[2]


@pytest.mark.parametrize("how", RULES)
def test_every_rule_takes_one_site_and_keeps_names_and_shapes(how: str) -> None:
    theta, deltas, weights = sites(1)
    new = aggregate(theta, deltas, weights, how)
    assert {name: tensor.shape for name, tensor in new.items()} == {n: t.shape for n, t in theta.items()}
    if how != "svd":
        torch.testing.assert_close(flat(new), flat(theta) + flat(deltas[0]), rtol=0, atol=1e-6)


def test_an_unknown_rule_and_no_update_are_errors() -> None:
    theta, deltas, weights = sites(1)
    for arguments in ((theta, deltas, weights, "best"), (theta, [], [], "mean")):
        with pytest.raises(ValueError, match="expected one of"):
            combine(*arguments)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.floats(0, 1))
def test_one_liar_leaves_the_score_between_what_others_say(others: list[float], lie: float) -> None:
    score = robust_mean([*others, lie], [1.0] * len(others) + [3.0])
    assert min(others) - 1e-9 <= score <= max(others) + 1e-9


def test_the_score_of_two_sites_is_their_mean() -> None:
    assert robust_mean([0.2, 0.8], [3, 1]) == pytest.approx(0.35)


def test_an_update_that_points_back_is_left_out() -> None:
    theta, deltas, _ = sites(4)
    flipped = [deltas[0], scaled(deltas[1], -1), deltas[2], deltas[3]]
    change, judged = combine(theta, flipped, [5.0] * 4, "norm_clipped")
    assert [one.left_out for one in judged] == [False, True, False, False]
    assert "points back" in judged[1].why
    wanted, _ = combine(theta, [deltas[0], deltas[2], deltas[3]], [5.0] * 3, "norm_clipped")
    torch.testing.assert_close(flat(change), flat(wanted), rtol=0, atol=1e-7)


def test_in_later_rounds_the_way_so_far_counts_and_not_the_others() -> None:
    """Near the end honest sites pull against each other: a site that differs is not left out for that."""
    theta, (pull, way, *_), _ = sites(3)
    start = {name: tensor - way[name] for name, tensor in theta.items()}
    apart = [{name: 0.5 * way[name] + sign * pull[name] for name in theta} for sign in (1, 1, -1, 1)]
    assert [one.left_out for one in judge(apart, [5.0] * 4)] == [False, False, True, False], "in a first round"
    _, judged = combine(theta, apart, [5.0] * 4, "norm_clipped", start=start)
    assert not any(one.left_out for one in judged)
    told = [apart[0], scaled(apart[1], -1), *apart[2:]]
    _, judged = combine(theta, told, [5.0] * 4, "norm_clipped", start=start)
    assert [one.left_out for one in judged] == [False, True, False, False]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_fewer_than_half_are_left_out_for_their_direction(count: int) -> None:
    theta, deltas, _ = sites(count)
    told = [scaled(delta, -1) if number % 2 else delta for number, delta in enumerate(deltas)]
    for start in (None, {name: tensor - deltas[0][name] for name, tensor in theta.items()}):
        _, judged = combine(theta, told, [5.0] * count, "norm_clipped", start=start)
        left_out = sum(one.left_out for one in judged)
        assert left_out == {2: 0, 3: 0, 4: 1, 5: 2, 6: 2, 7: 3}[count]
        assert count < 3 or any(one.why for one in judged)


def test_of_three_a_doubtful_update_is_scaled_down_because_a_mean_of_two_tells_too_much() -> None:
    theta, deltas, _ = sites(3)
    for factor, words in ((1000, "as long"), (-1, "points back"), (-1000, "points back")):
        _, judged = combine(theta, [deltas[0], scaled(deltas[1], factor), deltas[2]], [5.0] * 3, "norm_clipped")
        assert [one.left_out for one in judged] == [False] * 3
        assert words in judged[1].why
        assert judged[1].clipped_to <= sorted(one.norm for one in judged)[1]
