"""What a careful reader would ask about a run: the warnings of its page."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def warnings_of(results: Mapping[str, Any], curves: pd.DataFrame) -> list[str]:
    """What a careful reader would ask about, from the results and the curves of the run."""
    warnings = []
    few = [f"{name} ({site['cases']})" for name, site in results["sites"].items() if site["cases"] < FEW_CASES]
    if few:
        warnings.append(
            f"Fewer than {FEW_CASES} test cases, so that a mean says little: {', '.join(few)}. Test all folds."
        )
    for name, site in results["sites"].items():
        gain = gain_of(site)
        if gain is not None and gain < 0:
            warnings.append(
                f"At {name} the personal model is worse than the global one by {-gain:.3f}. Serve the global model "
                f"there (`pfedsam infer --global`), or keep less of the personal one (a smaller `interpolation`, if "
                f"its strategy can have one)."
            )
        for model in MODELS:
            if missed := site[f"failures_{model}"]:
                warnings.append(f"At {name} the {model} model missed a class in {missed} of {site['cases']} cases.")
    shares = curves[curves["tag"].str.startswith("expert_share_")] if len(curves) else curves
    for (site, tag), values in shares.groupby(["site", "tag"]):
        last = values.sort_values("round").iloc[-1].value
        if last < DEAD_SHARE:
            expert, layer = re.findall(r"\d+", str(tag))
            warnings.append(
                f"At {site} expert {expert} of layer {layer} is dead (share of the gate {last:.1%}): try fewer experts."
            )
    if (results["mean_personal"] or 0.0) < (results["mean_global"] or 0.0):
        warnings.append(
            "Over all sites the personal models are no better than the global one: compare with fedavg_lora "
            "(`pfedsam compare`) before you use them."
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
