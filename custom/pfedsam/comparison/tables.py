"""The tables of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from pfedsam.comparison.statistics import MODELS, against, seed_summary, site_summary, summary, unseen_summary

Records = Sequence[Mapping[str, Any]]


def tables(records: Records, reference: str, width: int) -> list[Table]:
    """Summary, sites, tests and unseen hospitals: those that the records have something for.

    One that is wider than `width` characters goes on in a table of its own, so that no number is broken over two lines.
    """
    return [
        _rich(part, title if number == 0 else "continued")
        for title, frame in _frames(records, reference)
        for number, part in enumerate(_fitting(frame, width))
    ]


def markdown(records: Records, reference: str, missing: Sequence[str] = ()) -> str:
    """The same tables as Markdown, what to beware of, the missing runs, and the run card."""
    parts = [f"**{title}**\n\n{_markdown(frame)}\n" for title, frame in _frames(records, reference)]
    parts += [f"{line}\n" for line in warnings(records)]
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.\n")
    cards = {f"{r['card']['code']}; {r['card']['machine']}" for r in records}
    splits = sorted({f"seed {r['seed']}: {r['card']['split']}" for r in records})
    # those of the comparison, not those that a strategy brings
    counted = Counter((key, json.dumps(value)) for r in records for key, value in r["settings"].items())
    settings = {key: json.loads(value) for (key, value), n in counted.items() if n > len(records) / 2}
    settings = {key: value for key, value in settings.items() if key not in ("seed", "experts")}
    parts.append(f"Code and machine: {' | '.join(sorted(cards))}. Splits: {', '.join(splits)}.")
    parts.append(f"Hashes of the configurations: {'; '.join(_configurations(records))}.")
    parts.append(f"Rounds: {sorted({r['rounds'] for r in records})}. Settings: {settings}.")
    return "\n".join(parts) + "\n"


def warnings(records: Records) -> list[str]:
    """What to know before numbers of one table are compared.

    Records of different code versions; and records whose card has `renamed_from`, the `strategy` by which the run was
    called, with its own `settings`, before defaults became what it had set.
    """
    versions: dict[str, set[str]] = {}
    renamed: dict[str, list[str]] = {}
    for record in records:
        card = record["card"]
        versions.setdefault(card["code"], set()).add(record["strategy"])
        if "renamed_from" in card:
            was = f"{record['strategy']} was {card['renamed_from']['strategy']} of {card['code']}"
            renamed.setdefault(was, []).append(str(record["seed"]))
    lines = []
    if len(versions) > 1:
        listed = "; ".join(f"{code} ({_some(sorted(names))})" for code, names in sorted(versions.items()))
        lines.append(f"Warning: the records are of {len(versions)} code versions: {listed}.")
    if renamed:
        listed = "; ".join(f"{was}, seed {', '.join(seeds)}" for was, seeds in renamed.items())
        lines.append(f"Warning: records of before a default changed, under the name that they have now: {listed}.")
    return lines


def _configurations(records: Records) -> list[str]:
    """As `pfedsam: 0 434655cb, 1 c35df981`: by seed, the start of the hash in the run card."""
    by_strategy: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda r: (r["strategy"], r["seed"])):
        by_strategy.setdefault(record["strategy"], []).append(f"{record['seed']} {record['card']['configuration'][:8]}")
    return [f"{strategy}: {', '.join(hashes)}" for strategy, hashes in by_strategy.items()]


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _frames(records: Records, reference: str) -> list[tuple[str, pd.DataFrame]]:
    """Titles, and tables of finished text."""
    frames = []
    overview = summary(records)
    if len(overview):
        shown = pd.DataFrame(index=overview.index)
        shown["folds"] = overview["folds"]
        shown["mean Dice"] = _numbers(overview["mean"], 3)
        shown["worst site"] = _numbers(overview["worst"], 3)
        if overview["deviation"].notna().any():
            shown["SD of seeds"] = _numbers(overview["deviation"], 3)
        shown["HD95"] = _numbers(overview["hd95"], 1)
        shown["ASD"] = _numbers(overview["asd"], 1)
        shown["NSD"] = _numbers(overview["nsd"], 3)
        shown["failed"] = [f"{a}/{b}" for a, b in zip(overview["failed"], overview["cases"], strict=True)]
        shown["steps"] = _numbers(overview["steps"], 0)
        below = "" if overview["complete"].all() else "; below, with fewer folds, on its own cases: not to be ranked"
        title = "Strategies on the test cases that all have, mean over sites"
        title += "; HD95 and ASD in the unit of the files' spacing, steps of the optimiser in a fold"
        frames.append((f"{title}{below}", shown))
        shown = pd.DataFrame(index=overview.index)
        shown["MB"] = _numbers(overview["megabytes"], 2)
        shown["MB to 95 %"] = _numbers(overview["to_95"], 1)
        shown["teacher passes"] = _numbers(overview["teacher_passes"], 0)
        shown["minutes"] = _numbers(overview["minutes"], 0)
        frames.append(("Cost: MB sent by a site in a round, by all to 95 % of the Dice; training of a seed", shown))
        sites = site_summary(records)
        text = sites.apply(lambda row: f"{row['mean']:.3f} [{row['low']:.2f}, {row['high']:.2f}]", axis=1)
        text.index = pd.MultiIndex.from_tuples(text.index, names=["strategy", "site"])
        shown = text.unstack("site").loc[overview.index].fillna("-")
        frames.append(("Dice of each site on the same cases, bootstrap 95 % interval over patients", shown))
        title = "Dice of each seed, all its test cases, then the last validation: global / personal, mean over sites"
        frames.append((title, _by_seed(records, list(overview.index))))
    tests = against(records, reference)
    if len(tests):
        shown = pd.DataFrame(index=tests.index)
        shown[f"{reference} minus it"] = [
            f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in tests.itertuples()
        ]
        shown["p (Holm)"] = [
            "< 0.001" if p < 0.001 else text for p, text in zip(tests["p"], _numbers(tests["p"], 3), strict=True)
        ]
        shown["pairs"] = [str(value) for value in tests["pairs"]]
        shown[f"{reference} is"] = tests["verdict"]
        frames.append((f"{reference} against each other strategy, paired over patients", shown))
    unseen = unseen_summary(records)
    if len(unseen):
        shown = unseen.apply(lambda column: pd.Series(_numbers(column, 3), index=column.index))
        shown.index = [f"{strategy}, {site}" for strategy, site in unseen.index]
        title = "Unseen hospital: the global model, and models of some of its cases (alone: without a global model)"
        frames.append((title, shown))
    return frames


def _by_seed(records: Records, order: Sequence[str]) -> pd.DataFrame:
    """One row for each strategy, two columns for each seed."""
    scores = seed_summary(records)
    rows: dict[str, dict[str, str]] = {strategy: {} for strategy in order}
    for part in ("test", "val"):
        texts = [_numbers(scores[f"{part}_{model}"], 3) for model in MODELS]
        for (strategy, seed), *pair in zip(scores.index.tolist(), *texts, strict=True):
            rows[strategy][f"{seed} {part}"] = " / ".join(pair)
    seeds = sorted({seed for _, seed in scores.index.tolist()})
    columns = [f"{seed} {part}" for seed in seeds for part in ("test", "val")]
    shown = pd.DataFrame.from_dict(rows, orient="index", columns=columns).fillna("-")
    shown.index.name = "strategy"
    return shown


def _numbers(values: pd.Series, digits: int) -> list[str]:
    """With so many digits, `-` for what was not measured."""
    return ["-" if pd.isna(value) else f"{value:.{digits}f}" for value in values]


def _fitting(frame: pd.DataFrame, width: int) -> list[pd.DataFrame]:
    """The table in parts, each with as many columns as fit beside the names of the rows."""
    room = width - len("┃  ┃") - max(map(len, [str(frame.index.name or ""), *map(str, frame.index)]))
    parts: list[list[str]] = [[]]
    left = room
    for column in frame.columns:
        needs = len("  ┃") + max(map(len, [str(column), *map(str, frame[column])]))
        if needs > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= needs
    return [frame[part] for part in parts]


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
