"""What a careful reader would ask about a run: the warnings of its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pfedsam.comparison.compare import read_records
from pfedsam.comparison.provenance import case_hash
from pfedsam.comparison.statistics import case_table
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.evaluation.site import MODELS

#: Of fewer cases a mean says little, and too much about each.
FEW_CASES = 5
#: An expert with a smaller share of its gate is dead.
DEAD_SHARE = 0.02
#: In place of a class where the values of single ones are not shown.
NO_CLASS = "a class"
#: A smaller Dice, or difference of two, is shown as 0.000.
ZERO = 0.0005


def read_alone(path: Path) -> dict[tuple[str, str], float]:
    """Dice of the models that sites trained alone, by site and hash of the case.

    The mean over the classes, and over the records of `local_only` that tested the case.
    """
    records = [record for record in read_records(path) if record["strategy"] == "local_only" and not record["held_out"]]
    cases = case_table(records)
    return {(str(site), str(case)): float(rows.dice.mean()) for (site, case), rows in cases.groupby(["site", "case"])}


def gain_of(site: Mapping[str, Any]) -> float | None:
    """What the personal model has more than the global one; None where it is not shown."""
    return None if site["dice_personal"] is None else site["dice_personal"] - site["dice_global"]


def warnings_of(
    results: Mapping[str, Any],
    curves: pd.DataFrame,
    classes: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
    rounds: int | None = None,
) -> list[str]:
    """What a careful reader would ask about, from the results and the curves of the run.

    Args:
        results: of `pfedsam.evaluation.tables.results`.
        curves: columns `site`, `tag`, `round`, `value`.
        classes: their names; by default numbers.
        settings: of the bundle in this run, as texts.
        rounds: of the run, where they are known.
    """
    return [
        *_few_cases(results),
        *_nothing_right(results, classes, settings or {}, rounds),
        *_missed(results, classes),
        *_no_gain(results),
        *_dead_experts(curves),
    ]


def _few_cases(results: Mapping[str, Any]) -> list[str]:
    few = [f"{name} ({site['cases']})" for name, site in results["sites"].items() if site["cases"] < FEW_CASES]
    if not few:
        return []
    return [f"Fewer than {FEW_CASES} test cases, so that a mean says little: {', '.join(few)}. Test all folds."]


def _by_class(results: Mapping[str, Any], classes: Sequence[str]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Mean Dice and number of failed cases by site, model and name of the class.

    Without single cases that of the site, as `NO_CLASS`: what is not shown is not told here.
    """
    if not results["cases"]:
        return {
            (name, model, NO_CLASS): (site[f"dice_{model}"], site[f"failures_{model}"])
            for name, site in results["sites"].items()
            for model in MODELS
            if site[f"dice_{model}"] is not None
        }
    rows: dict[tuple[str, str, str], list[tuple[float, bool]]] = {}
    for case in results["cases"]:
        names = classes if len(classes) == len(case["dice"]) else [f"class {n + 1}" for n in range(len(case["dice"]))]
        failed = case.get("failed") or [False] * len(names)
        for name, dice, missed in zip(names, case["dice"], failed, strict=True):
            rows.setdefault((case["site"], case["model"], name), []).append((dice, missed))
    return {
        key: (float(np.mean([dice for dice, _ in one])), sum(missed for _, missed in one)) for key, one in rows.items()
    }


def _nothing_right(
    results: Mapping[str, Any], classes: Sequence[str], settings: Mapping[str, str], rounds: int | None
) -> list[str]:
    """Where nothing that a model finds is right, and what to try."""
    where: dict[str, dict[str, list[str]]] = {}
    for (site, model, name), (dice, _) in _by_class(results, classes).items():
        if dice < ZERO:
            where.setdefault(name, {}).setdefault(site, []).append(model)
    if not where:
        return []
    told = "; ".join(
        f"{'all classes' if name == NO_CLASS else name} at "
        + ", ".join(f"{site} ({', '.join(models)})" for site, models in sites.items())
        for name, sites in where.items()
    )
    steps = [
        f"more rounds (`--rounds`{f'; this run had {rounds}' if rounds else ''})",
        f"a larger `image_size`{_now(settings, 'image_size')}: what is small is a few pixels of the network's image",
    ]
    if settings.get("field_of_view_mm", "null") != "null":
        steps.append(f"a `field_of_view_mm`{_now(settings, 'field_of_view_mm')} that holds what is looked for")
    values = ", ".join(f"{number} is {name}" for number, name in enumerate(classes, 1))
    steps.append(f"`pfedsam validate` for the label values of these sites{f' (here {values})' if values else ''}")
    return [f"Dice 0.000, so nothing that was found is right: {told}. Try, in this order: {'; '.join(steps)}."]


def _now(settings: Mapping[str, str], key: str) -> str:
    return f" ({settings[key]} now)" if key in settings else ""


def _missed(results: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Classes that a model missed in some cases, where it has found them in others."""
    counts: dict[tuple[str, str], list[str]] = {}
    for (site, model, name), (dice, failed) in _by_class(results, classes).items():
        if failed and dice >= ZERO:
            counts.setdefault((site, model), []).append(f"{name} in {failed}")
    return [
        f"At {site} the {model} model missed {', '.join(told)} of {results['sites'][site]['cases']} cases."
        for (site, model), told in counts.items()
    ]


def _no_gain(results: Mapping[str, Any]) -> list[str]:
    warnings = []
    for name, site in results["sites"].items():
        gain = gain_of(site)
        if gain is not None and gain <= -ZERO:
            warnings.append(
                f"At {name} the personal model is worse than the global one by {-gain:.3f}. Serve the global model "
                f"there (`pfedsam infer --global`), or keep less of the personal one (a smaller `interpolation`, if "
                f"its strategy can have one)."
            )
    if (results["mean_personal"] or 0.0) < (results["mean_global"] or 0.0):
        warnings.append(
            "Over all sites the personal models are no better than the global one: compare with fedavg_lora "
            "(`pfedsam compare`) before you use them."
        )
    return warnings


def _dead_experts(curves: pd.DataFrame) -> list[str]:
    warnings = []
    shares = curves[curves["tag"].str.startswith("expert_share_")] if len(curves) else curves
    for (site, tag), values in shares.groupby(["site", "tag"]):
        last = values.sort_values("round").iloc[-1].value
        if last < DEAD_SHARE:
            expert, layer = re.findall(r"\d+", str(tag))
            warnings.append(
                f"At {site} expert {expert} of layer {layer} is dead (share of the gate {last:.1%}): try fewer experts."
            )
    return warnings


def worse_than_alone(results: Mapping[str, Any], compare: Path, least: int) -> list[str]:
    """Sites whose personal model is worse than the one that they trained alone, on at least so many common cases."""
    alone = read_alone(compare)
    gains: dict[str, list[float]] = {site: [] for site in results["sites"]}
    for case in results["cases"]:
        key = case["site"], case_hash(case["site"], case["case"])
        if case["model"] == "personal" and key in alone:
            gains[case["site"]].append(float(np.mean(case["dice"])) - alone[key])
    if not any(gains.values()):
        raise PFedSAMError(
            ErrorCode.RUN_INCOMPLETE,
            f"{compare} holds no record of local_only with a test case of the sites {', '.join(gains)}.",
            "Run `pfedsam compare <data> --strategies local_only` on the same sites with the seed of the run.",
        )
    warnings = []
    for site, values in gains.items():
        if not values:
            warnings.append(f"{site} is in no record of local_only, so whether it does better alone is not known.")
        elif len(values) >= least and np.mean(values) < 0:
            warnings.append(
                f"At {site} the personal model is worse than the site's own training (local_only) by "
                f"{-np.mean(values):.3f} on the same {len(values)} test case(s). Let it use the model that it trains "
                f"alone, or keep more of the personal one (`interpolation` nearer to 1, if the strategy has one), or "
                f"give its final phase more epochs."
            )
    return warnings
