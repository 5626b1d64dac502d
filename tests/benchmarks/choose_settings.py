"""Settings of the strategies chosen on validation cases only: no test case is read.

    pfedsam split <folder with the site folders> --out runs/lgg-data
    python tests/benchmarks/choose_settings.py runs/lgg-data

Each choice is a strategy with a patch. It is trained as `pfedsam compare` trains it, on each fold, and the Dice on the
validation cases of each site is noted for the global and the personal model. With the folder `--out` of a comparison,
what that has trained is not trained again, and rounds are shared with it. Prints a table of means over the sites, and
over all cases, with which a training on the pool can be compared, and writes results/choices.jsonl. A choice and fold
that is in it with all the settings it has now is not repeated; rows of other settings, for example of a default that is
another now, stay in it and are shown as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from pfedsam.bundles import settings_of
from pfedsam.comparison.provenance import LATER
from pfedsam.comparison.run import Run
from pfedsam.data.site_folder import site_names
from pfedsam.training.catalogue import StrategyFile, find_strategy, patched
from pfedsam.training.federation import run_federation

BUNDLE, ROUNDS, FOLDS = "brain_lesion_mri", 8, (0, 1, 2)
#: Those of `make bench-lgg`.
SETTINGS: dict[str, Any] = {
    "image_size": 128,
    "adapted_blocks": 8,
    "amp": True,
    "batch_size": 4,
    "augmentations": 2,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}
#: Rule of the server where a choice names none, that of `make bench-lgg`.
AGGREGATION = "mean"
RESULTS = Path(__file__).parent / "results" / "choices.jsonl"
#: Each strategy's learning rates are tried times these, the same for all.
FACTORS = (0.25, 0.5, 2.0)
#: Strategies of which all learning rates are multiplied, and those of which only the personal phases' are, beside
#: shared tensors at the rate that is chosen for them.
SHARED = ("fedavg_lora", "fedprox", "fedmsa", "fedsam", "local_only", "centralised")
PERSONAL = ("pfedsam", "one_adapter", "fedavg_lora_ft", "ditto", "feddpa", "fedrep")


def times(strategy: str, factor: float) -> dict[str, Any]:
    """Patch that multiplies the learning rates of a strategy, of its personal phases only where it is in PERSONAL."""
    checked = find_strategy(strategy).checked()
    phases = [p for p in (*checked.phases, *checked.final) if strategy in SHARED or p.trains != ("shared",)]
    return {"phases": {phase.name: {"learning_rate": phase.learning_rate * factor} for phase in phases}}


def final(**changes: Any) -> dict[str, Any]:
    """Patch of pfedsam's final phase."""
    return {"phases": {"final": changes}}


def taught(weight: float, gate: bool = True) -> dict[str, Any]:
    """Patch of its distillation."""
    return final(distillation={"warmup_rounds": 0, "weight": weight, "quality_gate": gate})


class Patched(NamedTuple):
    """A strategy with a patch, as in `jobs/strategies/ablations.json`; `rounds` is ROUNDS if it is None."""

    base: str
    patch: dict[str, Any]
    rounds: int | None = None


def train(**changes: Any) -> Patched:
    """Patch of fedavg_lora's only phase."""
    return Patched("fedavg_lora", {"phases": {"train": changes}})


#: By name of the choice.
CHOICES: dict[str, Patched] = {
    **{name: Patched(name, {}) for name in (*SHARED, *PERSONAL)},
    **{
        f"{name}, rates times {factor:g}": Patched(name, times(name, factor))
        for name in (*SHARED, *PERSONAL)
        for factor in FACTORS
    },
    "fedavg_lora_ft, rates times 4": Patched("fedavg_lora_ft", times("fedavg_lora_ft", 4)),
    "pfedsam, no teacher": Patched("pfedsam", final(distillation=None)),
    "pfedsam, weight 0.5": Patched("pfedsam", taught(0.5)),
    "pfedsam, weight 0.5, no quality gate": Patched("pfedsam", taught(0.5, gate=False)),
    "pfedsam, interpolation 0.25": Patched("pfedsam", {"strategy": {"interpolation": 0.25}}),
    "pfedsam, interpolation 0.75": Patched("pfedsam", {"strategy": {"interpolation": 0.75}}),
    "pfedsam, whole": Patched("pfedsam", {"strategy": {"interpolation": 1}}),
    "pfedsam, token gate": Patched("pfedsam", {"overrides": {"gate": "token"}}),
    "pfedsam, bottleneck 64": Patched("pfedsam", {"overrides": {"bottleneck": 64}}),
    "pfedsam, experts in encoder and decoder": Patched(
        "pfedsam",
        {"overrides": {"expert_places": ["encoder", "decoder"]}},
    ),
    "local phase each round": Patched("local_phase_each_round", {}),
    "fedavg_lora, constant rate": train(inverse_time_decay=0),
    "fedavg_lora, rate falls within each round": train(inverse_time_decay=0, anneal="cosine"),
    "fedavg_lora, moments kept": train(keep_moments=True),
    "fedavg_lora, A and B at one rate": train(rates={"decoder_subset": 0.4}),
    "fedavg_lora, B at 16 times the rate": train(rates={"lora_b": 16, "decoder_subset": 0.4}),
    "fedavg_lora, 24 rounds of one epoch": Patched(
        "fedavg_lora", {"phases": {"train": {"epochs": 1, "inverse_time_decay": 0.5 / 3}}}, rounds=24
    ),
    "fedavg_lora, 16 rounds": Patched("fedavg_lora", {}, rounds=16),
    "fedavg_lora, products averaged": Patched("fedavg_lora", {"strategy": {"aggregation": "svd"}}),
    "fedavg_lora, factors in turn": Patched("fedavg_lora", {"strategy": {"aggregation": "alternate"}}),
    "fedavg_lora, rank 4": Patched("fedavg_lora", {"overrides": {"lora_rank": 4}}),
    "fedavg_lora, rank 64": Patched("fedavg_lora", {"overrides": {"lora_rank": 64}}),
    "fedavg_lora, all blocks": Patched("fedavg_lora", {"overrides": {"adapted_blocks": "all"}}),
    "fedavg_lora, LoRA of q and v": Patched("fedavg_lora", {"overrides": {"lora_places": ["qv"]}}),
    "fedavg_lora, decoder at the rate of LoRA's A": train(rates={"lora_b": 4}),
    "fedavg_lora, decoder at a tenth of it": train(rates={"lora_b": 4, "decoder_subset": 0.1}),
    "ditto, copy at one rate": Patched(
        "ditto", {"phases": {"local": {"rates": {"decoder_subset": 0.4}}, "final": {"learning_rate": 0.001}}}
    ),
    **{
        f"{name}, B at four times the rate": Patched(
            name, {"phases": {one: {"rates": {"lora_b": 4, "decoder_subset": 0.4}} for one in ("alone", "final")}}
        )
        for name in ("local_only", "centralised")
    },
    "centralised, all of SAM": Patched(
        "centralised",
        {
            "strategy": {"personal": ["encoder", "decoder_subset", "decoder_rest"]},
            "phases": {name: {"learning_rate": 0.0001, "rates": {}} for name in ("alone", "final")},
            "overrides": {"lora_rank": 0},
        },
    ),
}


@dataclass(frozen=True)
class Choice(Run):
    """A run of a comparison whose strategy is that of a choice: `strategy` is the name of the choice."""

    @property
    def named(self) -> StrategyFile:
        """The patched strategy."""
        base, patch, _ = CHOICES[self.strategy]
        return patched(base, {"base": base, **patch})

    @property
    def row_key(self) -> str:
        """Hash of the strategy and of all the bundle's settings, the defaults too."""
        strategy = self.file.checked().model_dump(mode="json")
        if self.file.kind != "federated":
            strategy["aggregation"] = AGGREGATION  # no server applies it
        told = [self.bundle, self.rounds, strategy]
        left_out = ("checkpoint", *LATER)
        settings = {key: value for key, value in settings_of(self.bundle, self.settings).items() if key not in left_out}
        return hashlib.sha256(json.dumps([*told, settings], sort_keys=True).encode()).hexdigest()[:16]


def choice(name: str, fold: int, data: Path | None = None) -> Choice:
    """A choice in one fold of the site folders in `data`; without it, to ask for its settings only."""
    rounds, sites = CHOICES[name].rounds or ROUNDS, site_names(data) if data else ()
    return Choice(str(data), sites, BUNDLE, name, fold, rounds, dict(SETTINGS), aggregation=AGGREGATION)


def measure(run: Choice, out: Path) -> dict[str, Any]:
    """Validation Dice of one choice in one fold."""
    started, (base, patch, _) = time.monotonic(), CHOICES[run.strategy]
    federation = run.federation(out)

    def tell(line: str) -> None:
        print(f"  {line}", flush=True)

    run_federation(federation, tell, aggregated=run.file.kind == "federated")
    last = [note for note in federation.history() if note["round"] == run.rounds]
    dice = {who: {note["site"]: note[f"val_dice_{who}"] for note in last} for who in ("global", "personal")}
    cases = {site: len(split["validation"]) for site, split in run.splits().items()}
    if run.file.kind == "pooled":
        cases = {"pooled": sum(cases.values())}
    told = {"key": run.row_key, "choice": run.strategy, "fold": run.seed, "base": base, "patch": patch}
    return {**told, "rounds": run.rounds, "dice": dice, "cases": cases, "seconds": time.monotonic() - started}


def is_current(row: dict[str, Any]) -> bool:
    """Whether a row is of a choice with the settings that it has now."""
    return row["choice"] in CHOICES and "fold" in row and row.get("key") == choice(row["choice"], row["fold"]).row_key


def over_cases(row: dict[str, Any], who: str) -> float:
    """Mean Dice over all validation cases, not a number where a row does not tell how many a site has."""
    dice, cases = pd.Series(row["dice"][who]), pd.Series(row.get("cases", {}), dtype=float)
    return float((dice * cases).sum(skipna=False) / cases.sum()) if len(cases) else float("nan")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, means over the folds of a choice, and one of the rows of older settings as they are."""
    from rich.console import Console
    from rich.table import Table

    sites = list(dict.fromkeys(site for row in rows for site in row["dice"]["personal"]))
    lines = pd.DataFrame(
        {
            "choice": row["choice"],
            "current": is_current(row),
            "folds": str(row.get("fold", 0)),
            **{who: pd.Series(row["dice"][who]).mean() for who in ("global", "personal")},
            **{f"{who}, cases": over_cases(row, who) for who in ("global", "personal")},
            **row["dice"]["personal"],
        }
        for row in rows
    )
    columns = ["global", "personal", "global, cases", "personal, cases", *sites]
    means = dict.fromkeys(columns, "mean")
    current = lines[lines.current].groupby("choice").agg({"folds": ",".join, **means}).reset_index()
    current = current.sort_values("choice", key=lambda names: names.map(list(CHOICES).index))
    for title, part in (("", current), (", of older settings", lines[~lines.current])):
        table = Table("choice", "folds", *columns, title=f"Dice on validation cases{title}")
        for line in part.to_dict("records"):
            numbers = ("-" if pd.isna(line[name]) else f"{line[name]:.3f}" for name in means)
            table.add_row(line["choice"], line["folds"], *numbers)
        if table.rows:
            Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds the site folders")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--folds", nargs="+", type=int, choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--out", type=Path, default=Path("runs/choices"), help="folder of trainings and features")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for fold in options.folds:
        for name in options.only:
            run = choice(name, fold, options.data.resolve())
            if run.row_key in {row.get("key") for row in rows}:
                continue
            print(f"{name}, fold {fold}", flush=True)
            rows.append(measure(run, options.out))
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
