"""Settings of the strategies chosen on validation cases only: no test case is read.

    python tests/benchmarks/choose_settings.py <folder with the site folders>

Each choice is a strategy with a patch, as in `jobs/strategies/ablations.json`. It is trained as `pfedsam compare`
trains it, on one fold, and the mean over the sites of the Dice on their validation cases is noted for the global and
the personal model. Choices that differ in the final phase only share the rounds before it. Prints a table and writes
results/choices.jsonl; choices that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from pfedsam.strategies import patched
from pfedsam.training.federation import Federation, run_federation

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
    """Patch of the learning rate of the shared tensors."""
    return {"phases": {name: {"learning_rate": rate} for name in ("train", "global")}}


#: name of a choice: (strategy, patch)
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "pfedsam": ("pfedsam", {}),
    "pfedsam, learning rate 0.002": ("pfedsam", shared_rate(0.002)),
    "pfedsam, learning rate 0.008": ("pfedsam", shared_rate(0.008)),
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


def measure(name: str, sites: dict[str, Path], out: Path) -> dict[str, Any]:
    """Validation Dice of one choice."""
    base, patch = CHOICES[name]
    file = patched(base, {"base": base, **patch})
    started, strategy = time.monotonic(), file.checked().model_copy(update={"validate_every": ROUNDS})
    told = json.dumps([strategy.model_dump(mode="json"), file.overrides, SETTINGS], sort_keys=True)
    folder = out / "choices" / hashlib.sha256(told.encode()).hexdigest()[:16]
    settings = {"feature_store": out / "features"}
    federation = Federation(BUNDLE, sites, strategy, folder, ROUNDS, {**SETTINGS, **file.overrides}, settings)

    def tell(line: str) -> None:
        print(f"  {line}", flush=True)

    if file.kind == "federated":
        federation.begun = federation.rounds_alone(out / "rounds")
    run_federation(federation, tell, aggregated=file.kind == "federated")
    last = [note for note in federation.history() if note["round"] == ROUNDS]
    dice = {who: {note["site"]: note[f"val_dice_{who}"] for note in last} for who in ("global", "personal")}
    return {"choice": name, "base": base, "patch": patch, "dice": dice, "seconds": time.monotonic() - started}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    sites = list(rows[0]["dice"]["personal"])
    table = Table("choice", "global", "personal", *sites, title="Dice on validation cases, fold 0")
    for row in sorted(rows, key=lambda one: list(CHOICES).index(one["choice"])):
        found = row["dice"]
        means = (f"{sum(found[who].values()) / len(sites):.3f}" for who in ("global", "personal"))
        table.add_row(row["choice"], *means, *(f"{found['personal'][site]:.3f}" for site in sites))
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
        if name in {row["choice"] for row in rows}:
            continue
        print(name, flush=True)
        rows.append(measure(name, sites, options.out))
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
