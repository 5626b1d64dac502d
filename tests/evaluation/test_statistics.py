"""Tables from records whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pfedsam.evaluation.comparison_tables import markdown, tables
from pfedsam.evaluation.statistics import against, bytes_to_share, interval, site_summary, summary, unseen_summary


def record(strategy: str, dice: dict[str, list[float]], *, seed: int = 0, held_out: str | None = None, **more) -> dict:
    cases = [
        {
            "site": site, "case": f"{site}-{seed}-{n}", "model": "personal", "dice": [d], "hd95": [2.0], "asd": [1.0],
            "nsd": [0.5], "failed": [d == 0],
        }
        for site, values in dice.items()
        for n, d in enumerate(values)
    ]  # fmt: skip
    common = {"key": f"{strategy}{seed}", "strategy": strategy, "kind": "federated", "seed": seed, "held_out": held_out}
    card = {"code": "1", "configuration": "c", "split": "s", "machine": "m"}
    costs = {"steps": 10, "teacher_passes": 5, "bytes_per_round": 1000, "seconds": {"training": 60.0}}
    return {
        **common,
        "rounds": 3,
        "settings": {"seed": seed},
        "cases": cases,
        "history": [],
        "card": card,
        **costs,
        **more,
    }


def test_mean_is_over_sites_and_the_worst_site_is_named() -> None:
    (row,) = summary([record("a", {"x": [0.2, 0.4], "y": [0.9]})]).itertuples()
    assert row.mean == pytest.approx((0.3 + 0.9) / 2)
    assert (row.worst, row.worst_site) == (pytest.approx(0.3), "x")
    assert (row.failed, row.cases, row.minutes) == (0, 3, 1.0)
    assert math.isnan(row.deviation)


def test_best_strategy_comes_first_and_seeds_deviate() -> None:
    table = summary([record("a", {"x": [0.2]}), record("b", {"x": [0.6]}), record("b", {"x": [0.8]}, seed=1)])
    assert list(table.index) == ["b", "a"]
    assert table.loc["b", "deviation"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert table.loc["b", "seeds"] == 2


def test_a_missed_case_is_counted() -> None:
    assert summary([record("a", {"x": [0.0, 0.5]})]).loc["a", "failed"] == 1


def test_interval_holds_the_mean_and_is_the_same_twice() -> None:
    values = np.random.default_rng(1).uniform(size=30).tolist()
    low, high = interval(values)
    assert low < np.mean(values) < high
    assert interval(values) == (low, high)
    assert interval([0.5]) == (0.5, 0.5)
    sites = site_summary([record("a", {"x": values})])
    assert (sites.loc[("a", "x"), "low"], sites.loc[("a", "x"), "high"]) == (low, high)


def test_a_clear_difference_is_told_and_noise_is_not() -> None:
    random = np.random.default_rng(0)
    base = random.uniform(0.4, 0.6, 40)
    records = [
        record("ours", {"x": (base + 0.1).tolist()}),
        record("worse", {"x": base.tolist()}),
        record("same", {"x": (base + 0.1 + random.normal(0, 0.05, 40)).tolist()}),
    ]
    table = against(records, "ours")
    assert table.loc["worse", "verdict"] == "better"
    assert table.loc["same", "verdict"] == "not distinguishable"
    assert table.loc["worse", "difference"] == pytest.approx(0.1)
    assert against(records, "worse").loc["ours", "verdict"] == "worse"


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests() -> None:
    from scipy.stats import wilcoxon

    random = np.random.default_rng(0)
    ours = random.uniform(size=20)
    others = {f"o{n}": ours - random.normal(0.05 * n, 0.1, 20) for n in range(3)}
    records = [record("ours", {"x": ours.tolist()}), *(record(k, {"x": v.tolist()}) for k, v in others.items())]
    table = against(records, "ours")
    raw = {name: wilcoxon(ours - values).pvalue for name, values in others.items()}
    smallest = min(raw, key=raw.__getitem__)
    assert table.loc[smallest, "p"] == pytest.approx(min(1.0, 3 * raw[smallest]))
    assert all(table.loc[name, "p"] >= raw[name] for name in raw)


def test_only_the_same_cases_are_paired() -> None:
    records = [record("ours", {"x": [0.5, 0.6, 0.7]}), record("other", {"x": [0.5, 0.6]})]
    assert against(records, "ours").loc["other", "pairs"] == 2


def test_bytes_until_the_dice_is_near_its_last() -> None:
    dice = {0: 0.1, 1: 0.5, 2: 0.79, 3: 0.8}
    history = [
        {"round": n, "site": site, "bytes": 100 if n < 3 else 0, "val_dice_global": d}
        for n, d in dice.items()
        for site in ("x", "y")
    ]
    # 0.79 is reached before round 2 trains: after two rounds of two sites
    assert bytes_to_share(record("a", {"x": [0.5]}, history=history)) == 400
    assert bytes_to_share(record("a", {"x": [0.5]}, history=history, bytes_per_round=0)) == 0
    assert math.isnan(bytes_to_share(record("a", {"x": [0.5]})))


def test_unseen_hospitals_are_apart() -> None:
    one = record("a", {"x": [0.2]}, held_out="x")
    one["cases"] += [{**one["cases"][0], "model": "personal_5", "dice": [0.4]}]
    one["cases"][0]["model"] = "global"
    table = unseen_summary([one])
    assert list(table.columns) == ["global", "personal_5"]
    assert summary([one]).empty


def test_the_markdown_names_what_is_missing() -> None:
    records = [record("ours", {"x": [0.5, 0.6]}), record("other", {"x": [0.5, 0.4]})]
    text = markdown(records, "ours", ["third, seed 0"])
    assert "Missing: third, seed 0." in text
    assert "| ours | 0.550 |" in text
    assert len(tables(records, "ours")) == 4
