"""From the records of a comparison to its tables: means, intervals, tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, wilcoxon
from statsmodels.stats.multitest import multipletests

MODELS = ("global", "personal")
METRICS = ("dice", "hd95", "asd", "nsd")
RESAMPLES = 9999
ALPHA = 0.05


def case_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each case, model and run: the classes' mean of each metric, `failed` if any class was missed.

    A record that does not tell the patient of a case takes it from one that does, else the case is the patient.

    Columns: `strategy`, `seed`, `held_out`, `site`, `case`, `patient`, `model`, `dice`, `hd95`, `asd`, `nsd`, `failed`.
    """
    patients = {
        (row["site"], row["case"]): row["patient"] for record in records for row in record["cases"] if "patient" in row
    }
    rows = [
        {
            **{key: record[key] for key in ("strategy", "seed", "held_out")},
            **{key: row[key] for key in ("site", "case", "model")},
            "patient": patients.get((row["site"], row["case"]), row["case"]),
            **{metric: float(np.mean(row[metric])) for metric in METRICS},
            "failed": any(row["failed"]),
        }
        for record in records
        for row in record["cases"]
    ]
    columns = ["strategy", "seed", "held_out", "site", "case", "patient", "model", *METRICS, "failed"]
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class Compared:
    """Cases on which strategies can be compared.

    Attributes:
        cases: rows of `case_table`: of a complete strategy those that all complete ones have, of another all its own.
        seeds: those that the complete strategies have in common, sorted.
        found: seeds of each strategy, sorted.
        complete: names of the strategies that have all of `seeds`; none if they have no case in common.
    """

    cases: pd.DataFrame
    seeds: tuple[int, ...]
    found: dict[str, tuple[int, ...]]
    complete: tuple[str, ...]

    def folds(self, strategy: str) -> str:
        """As `1/3`: seeds that a strategy has of those compared, and `(+1)` for one that was left out."""
        own = self.found[strategy]
        extra = len(set(own) - set(self.seeds))
        left_out = f" (+{extra})" if extra else ""
        return f"{len(set(own) & set(self.seeds))}/{len(self.seeds)}{left_out}"


def compared(records: Sequence[Mapping[str, Any]], model: str = "personal") -> Compared:
    """The (seed, site, case) that all complete strategies have.

    Complete is a strategy with the most seeds that at least two strategies have, whatever it has beside them: one fold
    more of one strategy neither changes its rank nor makes the others incomplete, and strategies of which only one fold
    is done take none from the others.
    """
    cases = case_table(records)
    cases = cases[(cases.model == model) & cases.held_out.isna()]
    strategy_seeds = {str(name): tuple(sorted(set(rows.seed))) for name, rows in cases.groupby("strategy")}
    if not strategy_seeds:
        return Compared(cases, (), strategy_seeds, ())
    having = {
        candidate: sum(set(candidate) <= set(own) for own in strategy_seeds.values())
        for candidate in set(strategy_seeds.values())
    }
    seeds = max(sorted(having), key=lambda candidate: (having[candidate] > 1, len(candidate), having[candidate]))
    complete = tuple(name for name, own in strategy_seeds.items() if set(seeds) <= set(own))
    complete_cases = cases[cases.strategy.isin(complete) & cases.seed.isin(seeds)]
    strategies = complete_cases.groupby(["seed", "site", "case"]).strategy.transform("nunique")
    common = complete_cases[strategies == len(complete)]
    if common.empty:
        return Compared(cases, seeds, strategy_seeds, ())
    return Compared(pd.concat([common, cases[~cases.strategy.isin(complete)]]), seeds, strategy_seeds, complete)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean (percentile; a single value is its own interval)."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        return float(data.mean()), float(data.mean())
    result = bootstrap((data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def summary(records: Sequence[Mapping[str, Any]], model: str = "personal") -> pd.DataFrame:
    """One row for each strategy: the complete ones on their common cases, best mean first, then the incomplete ones.

    Args:
        records: of any number of strategies and seeds.
        model: `personal` is what a site would use; `global` only where a strategy has both.

    Returns:
        Index `strategy`; columns: `mean` and `worst` (over sites, of the mean Dice over the site's patients),
        `deviation` (of `mean` over the seeds, NaN for one), the means of `hd95`, `asd`, `nsd` over sites, `failed`
        (number of cases), `cases`, `complete` and `folds` (see `Compared`), `seeds` (in the row), `steps` (of the
        optimiser) and `teacher_passes` of a seed (NaN where they were not counted), `megabytes` (sent by a site in a
        round, NaN if nothing is), `to_95` (megabytes sent by all sites until the validation Dice of the global model is
        95 % of its last), `minutes`.
        Costs are means over the seeds whose cases are in the row.
    """
    chosen = compared(records, model)
    table_rows = {}
    for strategy, rows in chosen.cases.groupby("strategy"):
        sites = _over_patients(rows, [])
        seeds = set(rows.seed)
        runs = [r for r in records if r["strategy"] == strategy and not r["held_out"] and r["seed"] in seeds]
        table_rows[strategy] = {
            "mean": sites.dice.mean(),
            "worst": sites.dice.min(),
            "worst_site": sites.dice.idxmin(),
            "deviation": _over_patients(rows, ["seed"]).dice.groupby("seed").mean().std(),
            **{metric: sites[metric].mean() for metric in METRICS[1:]},
            "failed": int(rows.failed.sum()),
            "cases": len(rows),
            "complete": strategy in chosen.complete,
            "folds": chosen.folds(str(strategy)),
            "seeds": len(seeds),
            "steps": _mean_known([run["steps"] for run in runs]),
            "teacher_passes": _mean_known([run["teacher_passes"] for run in runs]),
            "megabytes": _mean_known([run["bytes_per_round"] or None for run in runs]) / 1e6,
            "to_95": float(np.mean([bytes_to_share(run) for run in runs])) / 1e6,
            "minutes": float(np.mean([run["seconds"]["training"] for run in runs])) / 60,
        }
    table = pd.DataFrame.from_dict(table_rows, orient="index")
    table.index.name = "strategy"
    return table.sort_values(["complete", "mean"], ascending=False) if len(table) else table


def site_summary(records: Sequence[Mapping[str, Any]], model: str = "personal") -> pd.DataFrame:
    """Mean Dice of each strategy and site over its patients with the bootstrap interval, on the cases of `summary`.

    Returns:
        Index (strategy, site); columns `mean`, `low`, `high`, `patients`.
    """
    table_rows = {}
    for key, rows in compared(records, model).cases.groupby(["strategy", "site"]):
        patients = rows.groupby("patient", sort=False).dice.mean()
        low, high = interval(patients.tolist())
        table_rows[key] = {"mean": patients.mean(), "low": low, "high": high, "patients": len(patients)}
    return pd.DataFrame.from_dict(table_rows, orient="index")


def seed_summary(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Each run by itself, on all of its own cases.

    Returns:
        Index (strategy, seed); columns: Dice, mean over sites, on the test cases (of a site: over its patients) and in
        the last validation, of both models: `test_global`, `test_personal`, `val_global`, `val_personal`. The global
        model has beside it what a strategy keeps personal of the base network, as FedRep's head. NaN for what there is
        not: without a federation there is no global model, an ensemble is not validated, and the validation of pooled
        data is over its cases, not over sites. Empty without a run of known sites.
    """
    cases = case_table(records)
    cases = cases[cases.held_out.isna()]
    columns = ["test_global", "test_personal", "val_global", "val_personal"]
    table_rows = {}
    for key, rows in cases.groupby(["strategy", "seed"]):
        runs = [r for r in records if (r["strategy"], r["seed"]) == key and not r["held_out"]]
        notes = pd.DataFrame(runs[-1]["history"], columns=["round", *(f"val_dice_{model}" for model in MODELS)])
        last = notes.dropna(subset="val_dice_global")
        last = last[last["round"] == last["round"].max()].mean()
        validated = {"federated": MODELS, "local": ("personal",)}.get(runs[-1]["kind"], ())
        test = {f"test_{model}": _over_patients(rows[rows.model == model], []).dice.mean() for model in MODELS}
        table_rows[key] = {**test, **{f"val_{model}": last[f"val_dice_{model}"] for model in validated}}
    return pd.DataFrame.from_dict(table_rows, orient="index", columns=columns)


def against(records: Sequence[Mapping[str, Any]], reference: str) -> pd.DataFrame:
    """The reference against each other strategy on the (seed, site, case) that both have.

    Paired over patients: the difference of Dice, reference minus other, is averaged over the seeds and cases of one
    patient of a site, so that a patient counts once. Of these: mean, its bootstrap interval, and Wilcoxon's signed-rank
    test with Holm's correction over the strategies that are complete (see `Compared`): a strategy that is still being
    run changes no other's p.

    Returns:
        Index: the other strategy; columns `difference`, `low`, `high`, `p` (corrected), `pairs` (patients), `verdict`:
        `better`, `worse`, or `not distinguishable` where the interval holds 0 or p is at least 0.05; `not complete`,
        with p NaN, where the other or the reference has fewer seeds. Empty if the reference has no record.
    """
    cases = case_table(records)
    cases = cases[(cases.model == "personal") & cases.held_out.isna()]
    wide = cases.pivot_table(index=["seed", "site", "patient", "case"], columns="strategy", values="dice")
    columns = ["difference", "low", "high", "p", "pairs", "verdict"]
    if reference not in wide:
        return pd.DataFrame(columns=columns)
    complete = compared(records).complete
    table_rows = {}
    for other in wide.columns.drop(reference):
        differences = (wide[reference] - wide[other]).dropna().groupby(["site", "patient"]).mean()
        if differences.empty:
            continue
        low, high = interval(differences.tolist())
        p = np.nan
        if {reference, other} <= set(complete):
            p = float(wilcoxon(differences).pvalue) if differences.any() else 1.0
        table_rows[other] = {
            "difference": differences.mean(),
            "low": low,
            "high": high,
            "p": p,
            "pairs": len(differences),
        }
    table = pd.DataFrame.from_dict(table_rows, orient="index", columns=columns)
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p"] = multipletests(table.loc[tested, "p"].astype(float), alpha=ALPHA, method="holm")[1]
    sure = (table["p"] < ALPHA) & ((table["low"] > 0) | (table["high"] < 0))
    sign = np.where(table["difference"] > 0, "better", "worse")
    table["verdict"] = np.where(tested, np.where(sure, sign, "not distinguishable"), "not complete")
    return table


def unseen_summary(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Leave-one-site-out: mean Dice over patients, by strategy and unseen site (rows) and model (columns).

    Models: `global`, and by the number n of its training cases `personal_<n>` (beside the global model), `alone_<n>`.
    """
    cases = case_table(records)
    cases = cases[cases.held_out.notna()]
    if cases.empty:
        return pd.DataFrame()
    order = sorted(cases.model.unique(), key=lambda name: (int(name.partition("_")[2] or 0), name))
    patients = cases.groupby(["strategy", "site", "model", "patient"]).dice.mean().reset_index()
    return patients.pivot_table(index=["strategy", "site"], columns="model", values="dice")[order]


def bytes_to_share(record: Mapping[str, Any], share: float = 0.95) -> float:
    """Bytes sent by all sites until the global model's validation Dice is `share` of the last one.

    The Dice noted in round r is of the global model before r's training, so after r rounds of sending. NaN if nothing
    is sent, or that Dice is not known.
    """
    notes = pd.DataFrame(
        [{"round": n["round"], "bytes": n["bytes"], "dice": n.get("val_dice_global")} for n in record["history"]]
    )
    if notes.empty or not record["bytes_per_round"]:
        return float("nan")
    dice = notes.dropna(subset="dice").groupby("round").dice.mean()
    if dice.empty:
        return float("nan")
    first = dice.index[dice >= share * dice.iloc[-1]][0]
    return float(notes[notes["round"] < first].bytes.sum())


def _over_patients(rows: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Means of the metrics over the patients of a site, for each of `keys`: a patient of many cases counts once."""
    patients = rows.groupby([*keys, "site", "patient"])[[*METRICS]].mean()
    return patients.groupby([*keys, "site"]).mean()


def _mean_known(values: Sequence[float | None]) -> float:
    """Mean of what was counted, NaN if nothing was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
