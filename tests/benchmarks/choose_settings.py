"""Settings of the strategies chosen on validation cases only: no test case is read.

    python tests/benchmarks/choose_settings.py <folder with the site folders>

Each choice is a strategy with a patch, as in `jobs/strategies/ablations.json`. It is trained as `pfedsam compare`
trains it, on one fold, and the mean over the sites of the Dice on their validation cases is noted for the global and
the personal model. Choices that differ in the final phase only share the rounds before it. Prints a table and writes
results/choices.jsonl. A choice that is in it with all the settings it has now is not repeated; rows of other settings,
for example of a default that is another now, stay in it and are shown as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from pfedsam.bundles import settings_of
from pfedsam.strategies import StrategyFile, patched
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.phases import Strategy

BUNDLE, ROUNDS, SEED = "brain_lesion_mri", 8, 0
SETTINGS: dict[str, Any] = {
    "image_size": 128,
    "adapted_blocks": 8,
    "amp": True,
    "batch_size": 4,
    "augmentations": 2,
    "positives_per_case": 2,
    "negatives_per_case": 1,
    "seed": SEED,
}
RESULTS = Path(__file__).parent / "results" / "choices.jsonl"


def final(**changes: Any) -> dict[str, Any]:
    """Patch of the final phase."""
    return {"phases": {"final": changes}}


def taught(weight: float, gate: bool = True) -> dict[str, Any]:
    """Patch of the final phase's distillation."""
    return final(distillation={"warmup_rounds": 0, "weight": weight, "quality_gate": gate})


def shared_rate(rate: float) -> dict[str, Any]:
    """Patch of the learning rate of pfedsam's shared tensors."""
    return {"phases": {"global": {"learning_rate": rate}}}


#: name of a choice: (strategy, patch)
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "pfedsam": ("pfedsam", {}),
    "pfedsam, learning rate 0.002": ("pfedsam", shared_rate(0.002)),
    "pfedsam, learning rate 0.008": ("pfedsam", shared_rate(0.008)),
    "pfedsam, constant learning rate": ("constant_rate", {}),
    "pfedsam, learning rate times 0.8 a round": (
        "pfedsam",
        {"phases": {"global": {"inverse_time_decay": 0, "decay": 0.8}}},
    ),
    "pfedsam, no teacher": ("pfedsam", final(distillation=None)),
    "pfedsam, weight 0.5": ("pfedsam", taught(0.5)),
    "pfedsam, weight 0.5, no quality gate": ("pfedsam", taught(0.5, gate=False)),
    "pfedsam, final learning rate 0.00125": ("pfedsam", final(learning_rate=0.00125)),
    "pfedsam, final learning rate 0.005": ("pfedsam", final(learning_rate=0.005)),
    "pfedsam, final learning rate 0.005, no teacher": ("pfedsam", final(learning_rate=0.005, distillation=None)),
    "pfedsam, final learning rate 0.01": ("pfedsam", final(learning_rate=0.01)),
    "one expert, no teacher, final learning rate 0.005": ("one_adapter", final(learning_rate=0.005)),
    "pfedsam, learning rate 0.001, final learning rate 0.005": (
        "pfedsam",
        {"phases": {"global": {"learning_rate": 0.001}, "final": {"learning_rate": 0.005}}},
    ),
    "pfedsam, token gate": ("pfedsam", {"overrides": {"gate": "token"}}),
    "pfedsam, bottleneck 64": ("pfedsam", {"overrides": {"bottleneck": 64}}),
    "pfedsam, experts in encoder and decoder": (
        "pfedsam",
        {"overrides": {"expert_places": ["encoder", "decoder"]}},
    ),
    "pfedsam, all blocks": ("pfedsam", {"overrides": {"adapted_blocks": "all"}}),
    "pfedsam, LoRA of rank 16": ("pfedsam", {"overrides": {"lora_rank": 16}}),
    "one expert, no teacher": ("one_adapter", {}),
    "local phase each round": ("local_phase_each_round", {}),
    "fedavg_lora_ft": ("fedavg_lora_ft", {}),
    "fedavg_lora_ft, final learning rate 0.0005": ("fedavg_lora_ft", final(learning_rate=0.0005)),
    "fedavg_lora_ft, final learning rate 0.002": ("fedavg_lora_ft", final(learning_rate=0.002)),
    "local_only": ("local_only", {}),
    "local_only, learning rate 0.001": ("local_only", {"phases": {"alone": {"learning_rate": 0.001}}}),
}


def chosen(name: str) -> tuple[StrategyFile, Strategy]:
    """The strategy of a choice, as a file and as it is trained."""
    base, patch = CHOICES[name]
    file = patched(base, {"base": base, **patch})
    return file, file.checked().model_copy(update={"validate_every": ROUNDS})


def key(name: str) -> str:
    """Hash of the strategy and of all the bundle's settings of a choice, the defaults too."""
    file, strategy = chosen(name)
    told = [BUNDLE, ROUNDS, strategy.model_dump(mode="json"), settings_of(BUNDLE, {**SETTINGS, **file.overrides})]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def measure(name: str, sites: dict[str, Path], out: Path) -> dict[str, Any]:
    """Validation Dice of one choice."""
    started, (base, patch), (file, strategy) = time.monotonic(), CHOICES[name], chosen(name)
    folder, settings = out / "choices" / key(name), {"feature_store": out / "features"}
    federation = Federation(BUNDLE, sites, strategy, folder, ROUNDS, {**SETTINGS, **file.overrides}, settings)

    def tell(line: str) -> None:
        print(f"  {line}", flush=True)

    if file.kind == "federated":
        federation.begun = federation.rounds_alone(out / "rounds")
    run_federation(federation, tell, aggregated=file.kind == "federated")
    last = [note for note in federation.history() if note["round"] == ROUNDS]
    dice = {who: {note["site"]: note[f"val_dice_{who}"] for note in last} for who in ("global", "personal")}
    seconds = time.monotonic() - started
    return {"key": key(name), "choice": name, "base": base, "patch": patch, "dice": dice, "seconds": seconds}


def is_current(row: dict[str, Any]) -> bool:
    """Whether a row is of a choice with the settings that it has now."""
    return row["choice"] in CHOICES and row.get("key") == key(row["choice"])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, and one of the rows of older settings."""
    from rich.console import Console
    from rich.table import Table

    order, sites = list(CHOICES), list(rows[0]["dice"]["personal"])
    current = sorted((row for row in rows if is_current(row)), key=lambda row: order.index(row["choice"]))
    older = [row for row in rows if not is_current(row)]
    for title, part in (("", current), (", of older settings", older)):
        table = Table("choice", "global", "personal", *sites, title=f"Dice on validation cases, fold 0{title}")
        for row in part:
            found = row["dice"]
            means = (f"{sum(found[who].values()) / len(sites):.3f}" for who in ("global", "personal"))
            table.add_row(row["choice"], *means, *(f"{found['personal'][site]:.3f}" for site in sites))
        if part:
            Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds the site folders")
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--out", type=Path, default=Path("runs/choices"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sites = {path.name: path for path in sorted(options.data.iterdir()) if (path / "images").is_dir()}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name in options.only:
        if key(name) in {row.get("key") for row in rows}:
            continue
        print(name, flush=True)
        rows.append(measure(name, sites, options.out))
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
