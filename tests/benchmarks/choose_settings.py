"""Settings of the strategies chosen on validation cases only: no test case is read.

    python tests/benchmarks/choose_settings.py <folder with the site folders>

Each choice is a strategy with a patch, as in `jobs/strategies/ablations.json`. It is trained as `pfedsam compare`
trains it, on each fold, and the Dice on the validation cases of each site is noted for the global and the personal
model. With the folder `--out` of a comparison, what that has trained is not trained again, and rounds are shared with
it. Prints a table of means over the sites and writes results/choices.jsonl. A choice and fold that is in it with all
the settings it has now is not repeated; rows of other settings, for example of a default that is another now, stay in
it and are shown as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pfedsam.bundles import settings_of
from pfedsam.data.sites import site_names
from pfedsam.evaluation.runs import Run
from pfedsam.strategies import StrategyFile, find_strategy, patched
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
RESULTS = Path(__file__).parent / "results" / "choices.jsonl"
#: Each strategy's learning rates are tried times these, the same for all.
FACTORS = (0.5, 2.0)
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


#: name of a choice: (strategy, patch)
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*SHARED, *PERSONAL)},
    **{
        f"{name}, rates times {factor:g}": (name, times(name, factor))
        for name in (*SHARED, *PERSONAL)
        for factor in FACTORS
    },
    "pfedsam, no teacher": ("pfedsam", final(distillation=None)),
    "pfedsam, weight 0.5": ("pfedsam", taught(0.5)),
    "pfedsam, weight 0.5, no quality gate": ("pfedsam", taught(0.5, gate=False)),
    "pfedsam, interpolation 0.25": ("pfedsam", {"strategy": {"interpolation": 0.25}}),
    "pfedsam, interpolation 0.75": ("pfedsam", {"strategy": {"interpolation": 0.75}}),
    "pfedsam, whole": ("pfedsam", {"strategy": {"interpolation": 1}}),
    "pfedsam, token gate": ("pfedsam", {"overrides": {"gate": "token"}}),
    "pfedsam, bottleneck 64": ("pfedsam", {"overrides": {"bottleneck": 64}}),
    "pfedsam, experts in encoder and decoder": (
        "pfedsam",
        {"overrides": {"expert_places": ["encoder", "decoder"]}},
    ),
    "local phase each round": ("local_phase_each_round", {}),
    "fedavg_lora, constant rate": ("fedavg_lora", {"phases": {"train": {"inverse_time_decay": 0}}}),
    "fedavg_lora, products averaged": ("fedavg_lora", {"strategy": {"aggregation": "svd"}}),
    "fedavg_lora, factors in turn": ("fedavg_lora", {"strategy": {"aggregation": "alternate"}}),
    "fedavg_lora, rank 4": ("fedavg_lora", {"overrides": {"lora_rank": 4}}),
    "fedavg_lora, rank 64": ("fedavg_lora", {"overrides": {"lora_rank": 64}}),
    "fedavg_lora, all blocks": ("fedavg_lora", {"overrides": {"adapted_blocks": "all"}}),
    "fedavg_lora, LoRA of q and v": ("fedavg_lora", {"overrides": {"lora_places": ["qv"]}}),
    "fedavg_lora, decoder at the rate of LoRA": ("fedavg_lora", {"phases": {"train": {"rates": {}}}}),
    "fedavg_lora, decoder at a tenth of it": ("fedavg_lora", {"phases": {"train": {"rates": {"decoder_subset": 0.1}}}}),
}


@dataclass(frozen=True)
class Choice(Run):
    """A run of a comparison whose strategy is that of a choice: `strategy` is the name of the choice."""

    @property
    def file(self) -> StrategyFile:
        """The patched strategy."""
        base, patch = CHOICES[self.strategy]
        return patched(base, {"base": base, **patch})

    @property
    def row_key(self) -> str:
        """Hash of the strategy and of all the bundle's settings, the defaults too."""
        told = [self.bundle, self.rounds, self.file.checked().model_dump(mode="json")]
        settings = {key: value for key, value in settings_of(self.bundle, self.settings).items() if key != "checkpoint"}
        return hashlib.sha256(json.dumps([*told, settings], sort_keys=True).encode()).hexdigest()[:16]


def choice(name: str, fold: int, data: Path | None = None) -> Choice:
    """A choice in one fold of the site folders in `data`; without it, to ask for its settings only."""
    return Choice(str(data), site_names(data) if data else (), BUNDLE, name, fold, ROUNDS, dict(SETTINGS))


def measure(run: Choice, out: Path) -> dict[str, Any]:
    """Validation Dice of one choice in one fold."""
    started, (base, patch) = time.monotonic(), CHOICES[run.strategy]
    federation = run.federation(out)

    def tell(line: str) -> None:
        print(f"  {line}", flush=True)

    run_federation(federation, tell, aggregated=run.file.kind == "federated")
    last = [note for note in federation.history() if note["round"] == ROUNDS]
    dice = {who: {note["site"]: note[f"val_dice_{who}"] for note in last} for who in ("global", "personal")}
    told = {"key": run.row_key, "choice": run.strategy, "fold": run.seed, "base": base, "patch": patch}
    return {**told, "dice": dice, "seconds": time.monotonic() - started}


def is_current(row: dict[str, Any]) -> bool:
    """Whether a row is of a choice with the settings that it has now."""
    return row["choice"] in CHOICES and "fold" in row and row.get("key") == choice(row["choice"], row["fold"]).row_key


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
            **row["dice"]["personal"],
        }
        for row in rows
    )
    means = dict.fromkeys(["global", "personal", *sites], "mean")
    current = lines[lines.current].groupby("choice").agg({"folds": ",".join, **means}).reset_index()
    current = current.sort_values("choice", key=lambda names: names.map(list(CHOICES).index))
    for title, part in (("", current), (", of older settings", lines[~lines.current])):
        table = Table("choice", "folds", "global", "personal", *sites, title=f"Dice on validation cases{title}")
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
