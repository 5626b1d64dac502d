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

from pfedsam.site_model import read
from pfedsam.strategies import StrategyFile, patched
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.local import LocalTraining

BUNDLE, ROUNDS, SEED = "brain_lesion_mri", 8, 0
SETTINGS: dict[str, Any] = {
    "image_size": 128,
    "amp": True,
    "batch_size": 4,
    "augmentations": 2,
    "positives_per_case": 2,
    "negatives_per_case": 1,
    "seed": SEED,
}
#: Settings that change personal tensors alone.
OF_EXPERTS = ("experts", "bottleneck", "gate", "top_k", "expert_places")
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
    "pfedsam, no teacher": ("pfedsam", final(distillation=None)),
    "pfedsam, weight 0.2": ("pfedsam", taught(0.2)),
    "pfedsam, weight 0.5": ("pfedsam", taught(0.5)),
    "pfedsam, weight 0.5, no quality gate": ("pfedsam", taught(0.5, gate=False)),
    "pfedsam, final learning rate 0.0025": ("pfedsam", final(learning_rate=0.0025)),
    "pfedsam, final learning rate 0.01": ("pfedsam", final(learning_rate=0.01)),
    "pfedsam, token gate": ("pfedsam", {"overrides": {"gate": "token"}}),
    "pfedsam, bottleneck 64": ("pfedsam", {"overrides": {"bottleneck": 64}}),
    "pfedsam, experts in encoder and decoder": (
        "pfedsam",
        {"overrides": {"expert_places": ["encoder", "decoder"]}},
    ),
    "pfedsam, learning rate 0.0005": ("pfedsam", shared_rate(0.0005)),
    "pfedsam, learning rate 0.002": ("pfedsam", shared_rate(0.002)),
    "pfedsam, learning rate 0.004": ("pfedsam", shared_rate(0.004)),
    "pfedsam, learning rate 0.004, LoRA of rank 16": (
        "pfedsam",
        {**shared_rate(0.004), "overrides": {"lora_rank": 16}},
    ),
    "pfedsam, 8 blocks": ("pfedsam", {"overrides": {"adapted_blocks": 8}}),
    "pfedsam, 8 blocks, learning rate 0.004": (
        "pfedsam",
        {**shared_rate(0.004), "overrides": {"adapted_blocks": 8}},
    ),
    "one expert, no teacher": ("one_adapter", {}),
    "local phase each round": ("local_phase_each_round", {}),
    "fedavg_lora_ft": ("fedavg_lora_ft", {}),
    "fedavg_lora_ft, final learning rate 0.0005": ("fedavg_lora_ft", final(learning_rate=0.0005)),
    "fedavg_lora_ft, final learning rate 0.002": ("fedavg_lora_ft", final(learning_rate=0.002)),
    "fedavg_lora_ft, learning rate 0.0005": ("fedavg_lora_ft", shared_rate(0.0005)),
    "fedavg_lora_ft, learning rate 0.002": ("fedavg_lora_ft", shared_rate(0.002)),
}


def rounds_of(file: StrategyFile, sites: dict[str, Path], out: Path) -> Federation:
    """The federation of a choice without its final phase; choices with the same rounds have the same folder.

    Personal tensors that no round trains do not change the shared ones, so settings of theirs alone do not count.
    """
    strategy = file.checked().model_copy(update={"validate_every": ROUNDS, "final": (), "name": "rounds"})
    personal_in_rounds = any("shared" not in phase.trains for phase in strategy.phases)
    all_count = personal_in_rounds or not strategy.personal
    overrides = SETTINGS | {key: value for key, value in file.overrides.items() if all_count or key not in OF_EXPERTS}
    told = json.dumps([strategy.model_dump(mode="json"), overrides, ROUNDS], sort_keys=True)
    folder = out / "rounds" / hashlib.sha256(told.encode()).hexdigest()[:16]
    return Federation(BUNDLE, sites, strategy, folder, ROUNDS, overrides, {"feature_store": out / "features"})


def measure(name: str, sites: dict[str, Path], out: Path) -> dict[str, Any]:
    """Validation Dice of one choice."""
    base, patch = CHOICES[name]
    file = patched(base, {"base": base, **patch})
    started, strategy = time.monotonic(), file.checked()
    federation = rounds_of(file, sites, out)
    run_federation(federation, lambda line: print(f"  {line}", flush=True))
    theta, _ = federation.global_model()
    dice: dict[str, dict[str, float]] = {"global": {}, "personal": {}}
    for site, folder in sites.items():
        local = LocalTraining(
            BUNDLE, folder, strategy, {**SETTINGS, **file.overrides}, out / "sites" / site, **federation.settings
        )
        local.open()
        if any("shared" not in phase.trains for phase in strategy.phases):
            local.restore(read(federation.model_of(site)))
        local.receive(theta, local.fingerprint)
        dice["global"][site] = local.validate(experts=False)["val_dice"]
        local.finish(ROUNDS)
        dice["personal"][site] = local.validate(experts=True)["val_dice"]
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
