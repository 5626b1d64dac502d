"""Tables of evaluations: the one at the end of a federation, and a row for each case."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from pfedsam.bundles import class_names, find_bundle
from pfedsam.evaluation.site import MODELS, SiteEvaluation

RESULTS_FILE = "results.json"
METRICS = ("dice", "hd95", "asd", "nsd", "failed")
#: What the columns mean; short names keep the table whole in 80 columns.
CAPTION = (
    "Dice of the global and the personal model over whole test cases; * the worst site; failed: cases "
    "with a class not found at all (global, personal); MB: sent by the site in a round"
)
EXCLUDED = "; n of m cases: the others' patients were trained on or used for validation, they are left out"


def results(evaluations: Sequence[SiteEvaluation], sent: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    """All that the table shows, for JSON.

    Args:
        evaluations: one of each site.
        sent: bytes that left each site, by round.
    """
    sites = {
        evaluation.site: {
            "cases": len(evaluation.scores) // len(MODELS),
            "excluded": len(evaluation.excluded),
            **{f"dice_{model}": evaluation.mean(model) for model in MODELS},
            **{f"failures_{model}": evaluation.failures(model) for model in MODELS},
            "bytes_per_round": int(np.mean(list(sent[evaluation.site].values()))) if sent.get(evaluation.site) else 0,
        }
        for evaluation in evaluations
    }
    summary = {
        f"{kind}_{model}": float(function([site[f"dice_{model}"] for site in sites.values()]))
        for model in MODELS
        for kind, function in (("mean", np.mean), ("worst", np.min))
    }
    return {
        "sites": sites,
        **summary,
        "cases": [score.to_dict() for evaluation in evaluations for score in evaluation.scores],
    }


def write_results(
    evaluations: Sequence[SiteEvaluation],
    sent: Mapping[str, Mapping[int, int]],
    out: Path,
    bundle: str,
    overrides: Mapping[str, Any],
    section: str = "test",
) -> dict[str, Any]:
    """Write `results` with what they are of to `<out>/results.json`, which `pfedsam report` shows; returns them."""
    about = {"bundle": bundle, "overrides": dict(overrides), "section": section}
    table = {"about": about, **results(evaluations, sent)}
    (out / RESULTS_FILE).write_text(json.dumps(table, indent=2) + "\n")
    return table


def case_rows(evaluations: Sequence[SiteEvaluation], bundle: str) -> pd.DataFrame:
    """One row for each case, model and class: `site`, `case`, `model`, `class`, and the metrics of that class."""
    rows = [
        {
            "site": score.site,
            "case": score.case,
            "model": score.model,
            "class": name,
            **{metric: getattr(score, metric)[number] for metric in METRICS},
        }
        for evaluation in evaluations
        for score in evaluation.scores
        for number, name in enumerate(class_names(find_bundle(bundle)))
    ]
    return pd.DataFrame(rows, columns=["site", "case", "model", "class", *METRICS])


def site_table(found: Mapping[str, Any], title: str) -> Table:
    """The table of `results`: the worst site of each model is marked in words."""
    excluded = any(site.get("excluded") for site in found["sites"].values())
    table = Table(title=title, caption=CAPTION + (EXCLUDED if excluded else ""))
    for name, justify in (
        ("site", "left"),
        ("cases", "right"),
        ("global", "right"),
        ("personal", "right"),
        ("gain", "right"),
        ("failed", "right"),
        ("MB", "right"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name, site in found["sites"].items():
        marks = {m: " *" if site[f"dice_{m}"] == found[f"worst_{m}"] else "  " for m in MODELS}
        table.add_row(
            name,
            f"{site['cases']} of {site['cases'] + site['excluded']}" if site.get("excluded") else str(site["cases"]),
            *(f"{site[f'dice_{m}']:.3f}{marks[m]}" for m in MODELS),
            f"{site['dice_personal'] - site['dice_global']:+.3f}",
            f"{site['failures_global']}, {site['failures_personal']}",
            f"{site['bytes_per_round'] / 1e6:.2f}",
        )
    table.add_section()
    gain = found["mean_personal"] - found["mean_global"]
    table.add_row(
        "mean of sites", "", *(f"{found[f'mean_{m}']:.3f}  " for m in MODELS), f"{gain:+.3f}", "", "", style="bold"
    )
    return table
