"""From the records of a comparison to its tables: means, intervals, tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, wilcoxon
from statsmodels.stats.multitest import multipletests

METRICS = ("dice", "hd95", "asd", "nsd")
RESAMPLES = 9999
ALPHA = 0.05


def case_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each case, model and run: the classes' mean of each metric, `failed` if any class was missed.

    Columns: `strategy`, `seed`, `held_out`, `site`, `case`, `model`, `dice`, `hd95`, `asd`, `nsd`, `failed`.
    """
    rows = [
        {
            **{key: record[key] for key in ("strategy", "seed", "held_out")},
            **{key: row[key] for key in ("site", "case", "model")},
            **{metric: float(np.mean(row[metric])) for metric in METRICS},
            "failed": any(row["failed"]),
        }
        for record in records
        for row in record["cases"]
    ]
    columns = ["strategy", "seed", "held_out", "site", "case", "model", *METRICS, "failed"]
    return pd.DataFrame(rows, columns=columns)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean (percentile; a single value is its own interval)."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        return float(data.mean()), float(data.mean())
    found = bootstrap((data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summary(records: Sequence[Mapping[str, Any]], model: str = "personal") -> pd.DataFrame:
    """One row for each strategy, best mean first.

    Args:
        records: of any number of strategies and seeds.
        model: `personal` is what a site would use; `global` only where a strategy has both.

    Returns:
        Index `strategy`; columns: `mean` and `worst` (over sites, of the mean Dice over the site's cases), `deviation`
        (of `mean` over the seeds, NaN for one), the means of `hd95`, `asd`, `nsd` over sites, `failed` (number of
        cases), `cases`, `seeds`, `steps`, `teacher_passes`, `megabytes` (sent by a site in a round), `to_95` (megabytes
        sent by all sites until the validation Dice of the global model is 95 % of its last), `minutes`.
    """
    cases = case_table(records)
    cases = cases[(cases.model == model) & cases.held_out.isna()]
    found = {}
    for strategy, rows in cases.groupby("strategy"):
        sites = rows.groupby("site")[[*METRICS]].mean()
        by_seed = rows.groupby(["seed", "site"]).dice.mean().groupby("seed").mean()
        runs = [one for one in records if one["strategy"] == strategy and not one["held_out"]]
        found[strategy] = {
            "mean": sites.dice.mean(),
            "worst": sites.dice.min(),
            "worst_site": sites.dice.idxmin(),
            "deviation": by_seed.std(),
            **{metric: sites[metric].mean() for metric in METRICS[1:]},
            "failed": int(rows.failed.sum()),
            "cases": len(rows),
            "seeds": len(runs),
            "steps": float(np.mean([one["steps"] for one in runs])),
            "teacher_passes": float(np.mean([one["teacher_passes"] for one in runs])),
            "megabytes": float(np.mean([one["bytes_per_round"] for one in runs])) / 1e6,
            "to_95": float(np.mean([bytes_to_share(one) for one in runs])) / 1e6,
            "minutes": float(np.mean([one["seconds"]["training"] for one in runs])) / 60,
        }
    table = pd.DataFrame.from_dict(found, orient="index")
    table.index.name = "strategy"
    return table.sort_values("mean", ascending=False) if len(table) else table


def site_summary(records: Sequence[Mapping[str, Any]], model: str = "personal") -> pd.DataFrame:
    """Mean Dice of each strategy and site with its bootstrap interval: columns `mean`, `low`, `high`, `cases`."""
    cases = case_table(records)
    cases = cases[(cases.model == model) & cases.held_out.isna()]
    found = {}
    for key, rows in cases.groupby(["strategy", "site"]):
        low, high = interval(rows.dice.tolist())
        found[key] = {"mean": rows.dice.mean(), "low": low, "high": high, "cases": len(rows)}
    return pd.DataFrame.from_dict(found, orient="index")


def against(records: Sequence[Mapping[str, Any]], reference: str) -> pd.DataFrame:
    """The reference against each other strategy on the same cases.

    Paired over patients (a case of a seed): mean difference of Dice, reference minus other, its bootstrap interval, and
    Wilcoxon's signed-rank test with Holm's correction over the strategies.

    Returns:
        Index: the other strategy; columns `difference`, `low`, `high`, `p` (corrected), `pairs`, `verdict`:
        `better`, `worse`, or `not distinguishable` where the interval holds 0 or p is at least 0.05. Empty if the
        reference has no record.
    """
    cases = case_table(records)
    cases = cases[(cases.model == "personal") & cases.held_out.isna()]
    wide = cases.pivot_table(index=["seed", "site", "case"], columns="strategy", values="dice")
    columns = ["difference", "low", "high", "p", "pairs", "verdict"]
    if reference not in wide:
        return pd.DataFrame(columns=columns)
    found = {}
    for other in wide.columns.drop(reference):
        differences = (wide[reference] - wide[other]).dropna()
        if differences.empty:
            continue
        low, high = interval(differences.tolist())
        p = 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)
        found[other] = {"difference": differences.mean(), "low": low, "high": high, "p": p, "pairs": len(differences)}
    table = pd.DataFrame.from_dict(found, orient="index", columns=columns)
    if len(table):
        table["p"] = multipletests(table["p"].astype(float), alpha=ALPHA, method="holm")[1]
        sure = (table["p"] < ALPHA) & ((table["low"] > 0) | (table["high"] < 0))
        sign = np.where(table["difference"] > 0, "better", "worse")
        table["verdict"] = np.where(sure, sign, "not distinguishable")
    return table


def unseen_summary(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Leave-one-site-out: mean Dice by strategy and unseen site (rows) and model (columns)."""
    cases = case_table(records)
    cases = cases[cases.held_out.notna()]
    if cases.empty:
        return pd.DataFrame()
    order = sorted(cases.model.unique(), key=lambda name: int(name.rpartition("_")[2]) if "_" in name else 0)
    return cases.pivot_table(index=["strategy", "site"], columns="model", values="dice")[order]


def bytes_to_share(record: Mapping[str, Any], share: float = 0.95) -> float:
    """Bytes sent by all sites until the global model's validation Dice is `share` of the last one; NaN if unknown.

    The Dice noted in round r is of the global model before r's training, so after r rounds of sending.
    """
    notes = pd.DataFrame(
        [{"round": n["round"], "bytes": n["bytes"], "dice": n.get("val_dice_global")} for n in record["history"]]
    )
    if notes.empty or not record["bytes_per_round"]:
        return 0.0 if not record["bytes_per_round"] else float("nan")
    dice = notes.dropna(subset="dice").groupby("round").dice.mean()
    if dice.empty:
        return float("nan")
    first = dice.index[dice >= share * dice.iloc[-1]][0]
    return float(notes[notes["round"] < first].bytes.sum())
