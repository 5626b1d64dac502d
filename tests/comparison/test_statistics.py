"""Tables from records whose answers are known."""

from __future__ import annotations

import math
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from pfedsam.comparison.statistics import (
    against,
    bytes_to_share,
    case_table,
    interval,
    seed_summary,
    site_summary,
    summary,
    unseen_summary,
)
from pfedsam.comparison.tables import markdown, tables, warnings


def record(
    strategy: str, dice: dict[str, list[float]], *, seed: int = 0, fold: int | None = None,
    held_out: str | None = None, **more,
) -> dict:  # fmt: skip
    """A record whose cases are those of the fold, by default of a fold for each seed."""
    fold = seed if fold is None else fold
    cases = [
        {
            "site": site, "case": f"{site}-{fold}-{n}", "model": "personal", "dice": [d], "hd95": [2.0], "asd": [1.0],
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
    dice = {("a", 0): 0.2, ("a", 1): 0.3, ("b", 0): 0.6, ("b", 1): 0.8}
    table = summary([record(name, {"x": [value]}, seed=seed) for (name, seed), value in dice.items()])
    assert list(table.index) == ["b", "a"]
    assert table.loc["b", "deviation"] == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert table.loc["b", "seeds"] == 2


def test_an_extra_hard_fold_does_not_change_a_rank() -> None:
    records = [record(name, {"x": [dice], "y": [dice]}) for name, dice in (("a", 0.7), ("b", 0.6), ("c", 0.5))]
    hard = record("a", {"x": [0.1], "y": [0.0]}, seed=1)
    before, after = summary(records), summary([*records, hard])
    assert list(after.index) == list(before.index) == ["a", "b", "c"]
    assert after["mean"].tolist() == before["mean"].tolist()
    assert after["folds"].tolist() == ["1/1 (+1)", "1/1", "1/1"]
    assert after["failed"].sum() == 0
    assert site_summary([*records, hard]).loc[("a", "x"), "mean"] == pytest.approx(0.7)


def test_an_incomplete_strategy_is_below_the_complete_ones() -> None:
    seeds = (0, 1, 2)
    records = [record(name, {"x": [dice]}, seed=seed) for name, dice in (("a", 0.5), ("b", 0.4)) for seed in seeds]
    records.append(record("lucky", {"x": [0.9]}))
    table = summary(records)
    assert list(table.index) == ["a", "b", "lucky"]
    assert table["complete"].tolist() == [True, True, False]
    assert table["folds"].tolist() == ["3/3", "3/3", "1/3"]
    assert table.loc["a", "mean"] == pytest.approx(0.5)
    assert "| lucky | 1/3 |" in markdown(records, "a")
    assert "not to be ranked" in markdown(records, "a") and "not to be ranked" not in markdown(records[:-1], "a")


def test_strategies_with_one_fold_take_none_from_those_with_three() -> None:
    whole = [record(name, {"x": [dice]}, seed=seed) for name, dice in (("a", 0.5), ("b", 0.4)) for seed in (0, 1, 2)]
    begun = [record(f"begun{n}", {"x": [0.9]}) for n in range(5)]
    table = summary([*begun, *whole])
    assert list(table.index)[:2] == ["a", "b"]
    assert table["folds"].tolist() == ["3/3", "3/3", *["1/3"] * 5]


def test_strategies_are_ranked_on_the_cases_that_all_have() -> None:
    table = summary([record("a", {"x": [0.6, 0.6, 0.0]}), record("b", {"x": [0.5, 0.5]})])
    assert list(table.index) == ["a", "b"]
    assert table["cases"].tolist() == [2, 2]


def test_each_run_by_itself_with_its_last_validation() -> None:
    history = [
        {"round": 0, "site": "x", "val_dice_global": 0.1, "bytes": 1},
        {"round": 2, "site": "x", "val_dice_global": 0.6, "val_dice_personal": 0.8, "bytes": 1},
        {"round": 2, "site": "y", "val_dice_global": 0.4, "val_dice_personal": 0.5, "bytes": 1},
        {"round": 3, "site": "x", "bytes": 1},
    ]
    both = record("a", {"x": [0.2, 0.4], "y": [0.9]}, history=history)
    both["cases"] += [{**case, "model": "global", "dice": [0.5]} for case in both["cases"]]
    table = seed_summary([both, record("a", {"x": [0.7]}, seed=1), record("b", {"x": [0.1]}, held_out="x")])
    assert list(table.index) == [("a", 0), ("a", 1)]
    assert table.loc[("a", 0)].tolist() == pytest.approx([0.5, 0.6, 0.5, 0.65])
    assert table.loc[("a", 1), "test_personal"] == pytest.approx(0.7)
    assert table.loc[("a", 1)].isna().sum() == 3
    assert seed_summary([]).empty
    shown = markdown([both, record("a", {"x": [0.7]}, seed=1), record("b", {"x": [0.1]})], "a")
    assert "| strategy | 0 test | 0 val | 1 test | 1 val |" in shown
    assert "| a | 0.500 / 0.600 | 0.500 / 0.650 | - / 0.700 | - / - |" in shown
    assert "| b | - / 0.100 | - / - | - | - |" in shown


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
    assert "| worse | +0.100 [+0.100, +0.100] | < 0.001 | 40 | better |" in markdown(records, "ours")


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


def test_a_strategy_that_is_still_run_changes_no_other_p_and_has_no_verdict() -> None:
    random = np.random.default_rng(1)
    ours = random.uniform(size=(2, 20))

    def told(name: str, shift: float, seeds: tuple[int, ...] = (0, 1)):
        return [record(name, {"x": (ours[seed] - shift).tolist()}, seed=seed) for seed in seeds]

    done = [*told("ours", 0), *told("other", 0.05), *told("third", -0.01)]
    before, after = against(done, "ours"), against([*done, *told("begun", 0.2, (0,))], "ours")
    assert after.loc["begun", "verdict"] == "not complete" and math.isnan(after.loc["begun", "p"])
    assert after.loc["begun", "difference"] == pytest.approx(0.2)
    assert after.loc[before.index, "p"].tolist() == before["p"].tolist()
    assert after.loc[before.index, "verdict"].tolist() == before["verdict"].tolist() == ["better", "worse"]
    shown = markdown([*done, *told("begun", 0.2, (0,))], "ours")
    assert "| begun | +0.200 [+0.200, +0.200] | - | 20 | not complete |" in shown
    # beside a reference that is not complete itself, nothing is
    assert set(against([*done, *told("begun", 0.2, (0,))], "begun")["verdict"]) == {"not complete"}


def test_without_a_server_nothing_is_sent_and_there_is_no_global_model() -> None:
    history = [{"round": 0, "site": "x", "val_dice_global": 0.1, "val_dice_personal": 0.2, "bytes": 0}]
    nothing = {"bytes_per_round": 0, "history": history}
    records = [record(kind, {"x": [0.5]}, kind=kind, **nothing) for kind in ("local", "pooled", "ensemble")]
    assert summary(records)[["megabytes", "to_95"]].isna().all(axis=None)
    table = seed_summary(records)
    assert table["val_global"].isna().all()
    assert table["val_personal"].dropna().to_dict() == {("local", 0): 0.2}


def test_only_the_same_cases_are_paired() -> None:
    records = [record("ours", {"x": [0.5, 0.6, 0.7]}), record("other", {"x": [0.5, 0.6]})]
    assert against(records, "ours").loc["other", "pairs"] == 2


def test_the_same_cases_under_three_seeds_give_the_p_of_one() -> None:
    random = np.random.default_rng(3)
    ours, other = random.uniform(0.5, 0.7, 12), random.uniform(0.4, 0.6, 12)

    def told(seeds: tuple[int, ...]):
        pairs = (("ours", ours), ("other", other))
        return [record(name, {"x": values.tolist()}, seed=s, fold=0) for name, values in pairs for s in seeds]

    one, three = against(told((0,)), "ours"), against(told((0, 1, 2)), "ours")
    assert three.loc["other", "pairs"] == 12
    np.testing.assert_allclose(three[["difference", "low", "high", "p"]], one[["difference", "low", "high", "p"]])
    limits = ["mean", "low", "high", "patients"]
    np.testing.assert_allclose(site_summary(told((0, 1, 2)))[limits], site_summary(told((0,)))[limits])


def test_cases_of_one_patient_count_once() -> None:
    ours, other = record("ours", {"x": [0.9, 0.5, 0.7]}), record("other", {"x": [0.5, 0.5, 0.4]})
    for row, patient in zip(ours["cases"], ("p", "p", "q"), strict=True):
        row["patient"] = patient
    # a record that does not tell the patients takes them from one that does
    assert case_table([ours, other]).patient.tolist() == ["p", "p", "q"] * 2
    table = against([ours, other], "ours")
    assert table.loc["other", "pairs"] == 2
    assert table.loc["other", "difference"] == pytest.approx(((0.4 + 0.0) / 2 + 0.3) / 2)
    assert summary([ours]).loc["ours", "mean"] == pytest.approx((0.7 + 0.7) / 2)
    assert summary([ours]).loc["ours", "cases"] == 3
    # without any, a case is a patient
    assert against([record("ours", {"x": [0.9, 0.5, 0.7]}), other], "ours").loc["other", "pairs"] == 3


def test_records_of_several_code_versions_are_told() -> None:
    old, new = record("ours", {"x": [0.5]}), record("other", {"x": [0.6]})
    assert warnings([old, new]) == []
    assert "Warning" not in markdown([old, new], "ours")
    new["card"]["code"] = "2"
    (line,) = warnings([old, new])
    assert "1 (ours); 2 (other)" in line
    assert line in markdown([old, new], "ours")


def test_a_record_of_before_a_default_changed_is_told_under_both_names() -> None:
    one, other = record("ours", {"x": [0.5]}), record("ours", {"x": [0.6]}, seed=1)
    other["card"]["renamed_from"] = {"strategy": "wide", "settings": {"lora_rank": 16}}
    (line,) = warnings([one, other])
    assert "ours was wide of 1, seed 1" in line and "seed 0" not in line
    assert line in markdown([one, other], "ours")


def test_the_run_card_has_the_hashes_of_the_configurations() -> None:
    assert "configurations: a: 0 c, 1 c; b: 0 c." in markdown(
        [record("b", {"x": [0.5]}), record("a", {"x": [0.5]}, seed=1), record("a", {"x": [0.5]})], "a"
    )


def test_what_was_not_counted_is_a_dash_and_in_no_mean() -> None:
    simulated = record("a", {"x": [0.5]}, steps=None, teacher_passes=None)
    both = summary([simulated, record("a", {"x": [0.5]}, seed=1, steps=30)])
    assert both.loc["a", "steps"] == 30
    text = markdown([simulated], "a")
    assert "| a | 1/1 | 0.500 | 0.500 | 2.0 | 1.0 | 0.500 | 0/1 | - |" in text
    assert "nan" not in text


def test_bytes_until_the_dice_is_near_its_last() -> None:
    dice = {0: 0.1, 1: 0.5, 2: 0.79, 3: 0.8}
    history = [
        {"round": n, "site": site, "bytes": 100 if n < 3 else 0, "val_dice_global": d}
        for n, d in dice.items()
        for site in ("x", "y")
    ]
    # 0.79 is reached before round 2 trains: after two rounds of two sites
    assert bytes_to_share(record("a", {"x": [0.5]}, history=history)) == 400
    assert math.isnan(bytes_to_share(record("a", {"x": [0.5]}, history=history, bytes_per_round=0)))
    assert math.isnan(bytes_to_share(record("a", {"x": [0.5]})))


def test_unseen_hospitals_are_apart() -> None:
    one = record("a", {"x": [0.2]}, held_out="x")
    one["cases"] += [{**one["cases"][0], "model": "personal_5", "dice": [0.4]}]
    one["cases"][0]["model"] = "global"
    alone = record("b", {"x": [0.3]}, held_out="x")
    alone["cases"] = [{**alone["cases"][0], "model": f"alone_{n}"} for n in (10, 5)]
    table = unseen_summary([one, alone])
    assert list(table.columns) == ["global", "alone_5", "personal_5", "alone_10"]
    assert "| b, x | - | 0.300 | - | 0.300 |" in markdown([one, alone], "a")
    assert summary([one]).empty
    # a patient of two cases counts once
    one["cases"] = [{**one["cases"][0], "case": f"c{n}", "patient": p, "dice": [d]} for n, (p, d) in enumerate(
        (("p", 0.1), ("p", 0.3), ("q", 0.8))
    )]  # fmt: skip
    assert unseen_summary([one]).loc[("a", "x"), "global"] == pytest.approx((0.2 + 0.8) / 2)


def test_the_markdown_names_what_is_missing() -> None:
    records = [record("ours", {"x": [0.5, 0.6]}), record("other", {"x": [0.5, 0.4]})]
    text = markdown(records, "ours", ["third, seed 0"])
    assert "Missing: third, seed 0." in text
    assert "| ours | 1/1 | 0.550 |" in text
    assert len(tables(records, "ours", width=200)) == 5


def test_a_narrow_terminal_breaks_no_number() -> None:
    sites = {f"a_hospital_{n}": [0.5, 0.6] for n in range(5)}
    records = [record("ours", sites), record("another_with_a_long_name", sites)]
    console = Console(width=80, file=StringIO(), force_terminal=True, color_system=None)
    for table in tables(records, "ours", console.width):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    rows = [line.split("|")[1:-1] for line in markdown(records, "ours").splitlines() if line.startswith("| ")]
    for cell in {cell.strip() for row in rows for cell in row}:
        assert f" {cell} " in shown
