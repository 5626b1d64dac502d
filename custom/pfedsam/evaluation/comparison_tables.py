"""The tables of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from pfedsam.evaluation.statistics import against, site_summary, summary, unseen_summary

Records = Sequence[Mapping[str, Any]]


def tables(records: Records, reference: str) -> list[Table]:
    """Summary, sites, tests and unseen hospitals: those that the records have something for."""
    return [_rich(frame, title) for title, frame in _frames(records, reference)]


def markdown(records: Records, reference: str, missing: Sequence[str] = ()) -> str:
    """The same tables as Markdown, the missing runs, and the run card."""
    parts = [f"**{title}**\n\n{_markdown(frame)}\n" for title, frame in _frames(records, reference)]
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.\n")
    cards = {f"{r['card']['code']}; {r['card']['machine']}" for r in records}
    splits = sorted({f"seed {r['seed']}: {r['card']['split']}" for r in records})
    # those of the comparison, not those that a strategy brings
    counted = Counter((key, json.dumps(value)) for r in records for key, value in r["settings"].items())
    settings = {key: json.loads(value) for (key, value), n in counted.items() if n > len(records) / 2}
    settings = {key: value for key, value in settings.items() if key not in ("seed", "experts")}
    parts.append(f"Code and machine: {' | '.join(sorted(cards))}. Splits: {', '.join(splits)}.")
    parts.append(f"Rounds: {sorted({r['rounds'] for r in records})}. Settings: {settings}.")
    return "\n".join(parts) + "\n"


def _frames(records: Records, reference: str) -> list[tuple[str, pd.DataFrame]]:
    """Titles, and tables of finished text."""
    frames = []
    found = summary(records)
    if len(found):
        shown = pd.DataFrame(index=found.index)
        shown["mean Dice"] = [f"{value:.3f}" for value in found["mean"]]
        shown["worst site"] = [f"{value:.3f}" for value in found["worst"]]
        if found["deviation"].notna().any():
            shown["SD of seeds"] = [f"{value:.3f}" for value in found["deviation"]]
        shown["HD95"] = [f"{value:.1f}" for value in found["hd95"]]
        shown["ASD"] = [f"{value:.1f}" for value in found["asd"]]
        shown["NSD"] = [f"{value:.3f}" for value in found["nsd"]]
        shown["failed"] = [f"{a}/{b}" for a, b in zip(found["failed"], found["cases"], strict=True)]
        frames.append(("Strategies on the test cases, mean over sites", shown))
        shown = pd.DataFrame(index=found.index)
        shown["MB"] = [f"{value:.2f}" for value in found["megabytes"]]
        shown["MB to 95 %"] = [f"{value:.1f}" for value in found["to_95"]]
        shown["steps"] = [f"{value:.0f}" for value in found["steps"]]
        shown["teacher passes"] = [f"{value:.0f}" for value in found["teacher_passes"]]
        shown["minutes"] = [f"{value:.0f}" for value in found["minutes"]]
        frames.append(("Cost: MB sent by a site in a round, by all to 95 % of the Dice; training of a seed", shown))
        sites = site_summary(records)
        text = sites.apply(lambda row: f"{row['mean']:.3f} [{row['low']:.2f}, {row['high']:.2f}]", axis=1)
        text.index = pd.MultiIndex.from_tuples(text.index, names=["strategy", "site"])
        frames.append(("Dice of each site, bootstrap 95 % interval", text.unstack("site").loc[found.index]))
    tests = against(records, reference)
    if len(tests):
        shown = pd.DataFrame(index=tests.index)
        shown[f"{reference} minus it"] = [
            f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in tests.itertuples()
        ]
        shown["p (Holm)"] = [f"{value:.3f}" for value in tests["p"]]
        shown["pairs"] = [str(value) for value in tests["pairs"]]
        shown[f"{reference} is"] = tests["verdict"]
        frames.append((f"{reference} against each other strategy, paired over patients", shown))
    unseen = unseen_summary(records)
    if len(unseen):
        shown = unseen.map(lambda value: f"{value:.3f}")
        shown.index = [f"{strategy}, {site}" for strategy, site in unseen.index]
        frames.append(("Unseen hospital: the global model, and personal models of some cases", shown))
    return frames


def _rich(frame: pd.DataFrame, title: str) -> Table:
    table = Table(title=title)
    table.add_column(str(frame.index.name or ""), no_wrap=True)
    for column in frame.columns:
        table.add_column(str(column), justify="right", overflow="fold")
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        table.add_row(str(name), *(str(value) for value in row))
    return table


def _markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join([str(frame.index.name or ""), *map(str, frame.columns)]) + " |"]
    lines.append("|---" + "|---:" * len(frame.columns) + "|")
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        lines.append("| " + " | ".join([str(name), *map(str, row)]) + " |")
    return "\n".join(lines)
