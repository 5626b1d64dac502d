"""Settings of the strategies chosen on validation cases only: no test case is read.

    python tests/benchmarks/choose_settings.py <folder with the site folders>

Each choice is a strategy with a patch, as in `jobs/strategies/ablations.json`. It is trained as `pfedsam compare`
trains it, on each fold, and the Dice on the validation cases of each site is noted for the global and the personal
model. Choices that differ in the final phase only share the rounds before it, with those of `pfedsam compare` too if
both have the same folder `--out`. Prints a table of means over the sites and writes results/choices.jsonl. A choice and
fold that is in it with all the settings it has now is not repeated; rows of other settings, for example of a default
that is another now, stay in it and are shown as such.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pfedsam.bundles import settings_of
from pfedsam.data.sites import read_split
from pfedsam.evaluation.runs import Run, split_hash
from pfedsam.strategies import StrategyFile, patched
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.phases import Strategy

BUNDLE, ROUNDS, FOLDS = "brain_lesion_mri", 8, (0, 1, 2)
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


def final(**changes: Any) -> dict[str, Any]:
    """Patch of the final phase."""
    return {"phases": {"final": changes}}


def taught(weight: float, gate: bool = True) -> dict[str, Any]:
    """Patch of the final phase's distillation."""
    return final(distillation={"warmup_rounds": 0, "weight": weight, "quality_gate": gate})


def whole(patch: dict[str, Any]) -> dict[str, Any]:
    """A patch with the personal part kept whole, as the final phase left it."""
    return {**patch, "strategy": {"interpolation": 1}}


def shared_rate(rate: float) -> dict[str, Any]:
    """Patch of the learning rate of pfedsam's shared tensors."""
    return {"phases": {"global": {"learning_rate": rate}}}


def slower(rate: float, decoder: float, **settings: Any) -> dict[str, Any]:
    """Patch of the rate of LoRA and of the decoder's factor of it: the decoder is pretrained, LoRA starts at zero."""
    return {"phases": {"train": {"learning_rate": rate, "rates": {"decoder_subset": decoder}}}, **settings}


def lora(*places: str, **settings: Any) -> dict[str, Any]:
    """Patch of where LoRA is."""
    return {"overrides": {"lora_places": list(places), **settings}}


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
    "pfedsam, interpolation 0.25": ("pfedsam", {"strategy": {"interpolation": 0.25}}),
    "pfedsam, interpolation 0.75": ("pfedsam", {"strategy": {"interpolation": 0.75}}),
    "pfedsam, whole": ("pfedsam", whole({})),
    "pfedsam, whole, no teacher": ("pfedsam", whole(final(distillation=None))),
    "pfedsam, whole, weight 0.5": ("pfedsam", whole(taught(0.5))),
    "pfedsam, whole, final learning rate 0.00125": ("pfedsam", whole(final(learning_rate=0.00125))),
    "pfedsam, whole, final learning rate 0.005": ("pfedsam", whole(final(learning_rate=0.005))),
    "one expert, no teacher, whole": ("one_adapter", whole({})),
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
    "fedavg_lora": ("fedavg_lora", {}),
    "fedavg_lora, LoRA in the MLPs too": ("fedavg_lora", lora("qv", "mlp")),
    "fedavg_lora, a tenth of the rate for the decoder": ("fedavg_lora", slower(0.004, 0.1)),
    "fedavg_lora, a fortieth of the rate for the decoder": ("fedavg_lora", slower(0.004, 0.025)),
    "fedavg_lora, LoRA in all layers, learning rate 0.001, 0.4 of it for the decoder": (
        "fedavg_lora",
        slower(0.001, 0.4, **lora("qv", "projection", "mlp")),
    ),
    "fedavg_lora, LoRA in all layers, learning rate 0.002, 0.2 of it for the decoder": (
        "fedavg_lora",
        slower(0.002, 0.2, **lora("qv", "projection", "mlp")),
    ),
    "fedavg_lora, LoRA in all layers, of rank 16, learning rate 0.001, 0.4 of it for the decoder": (
        "fedavg_lora",
        slower(0.001, 0.4, **lora("qv", "projection", "mlp", lora_rank=16)),
    ),
    "fedavg_lora, LoRA in all layers, in all blocks and in the decoder, rank 16, learning rate 0.001": (
        "fedavg_lora",
        slower(0.001, 0.4, **lora("qv", "projection", "mlp", lora_rank=16, adapted_blocks="all", decoder_rank=16)),
    ),
    "fedavg_lora, LoRA in all layers, in all blocks and in the decoder, rank 16": (
        "fedavg_lora",
        lora("qv", "projection", "mlp", lora_rank=16, adapted_blocks="all", decoder_rank=16),
    ),
    "one expert, no teacher": ("one_adapter", {}),
    "local phase each round": ("local_phase_each_round", {}),
    "fedavg_lora_ft": ("fedavg_lora_ft", {}),
    "fedavg_lora_ft, interpolated": ("fedavg_lora_ft_interpolated", {}),
    "fedavg_lora_ft, final learning rate 0.0005": ("fedavg_lora_ft", final(learning_rate=0.0005)),
    "fedavg_lora_ft, final learning rate 0.002": ("fedavg_lora_ft", final(learning_rate=0.002)),
    "feddpa": ("feddpa", {}),
    "feddpa, final learning rate 0.00125": ("feddpa", final(learning_rate=0.00125)),
    "feddpa, final learning rate 0.005": ("feddpa", final(learning_rate=0.005)),
    "ditto": ("ditto", {}),
    "ditto, final learning rate 0.001": ("ditto", final(learning_rate=0.001)),
    "ditto, final learning rate 0.002": ("ditto", final(learning_rate=0.002)),
    "fedrep": ("fedrep", {}),
    "fedrep, final learning rate 0.001": ("fedrep", final(learning_rate=0.001)),
    "fedrep, final learning rate 0.002": ("fedrep", final(learning_rate=0.002)),
    "fedmsa": ("fedmsa", {}),
    "fedmsa, learning rate 0.001": ("fedmsa", {"phases": {"train": {"learning_rate": 0.001}}}),
    "fedmsa, learning rate 0.002": ("fedmsa", {"phases": {"train": {"learning_rate": 0.002}}}),
    "local_only": ("local_only", {}),
    "local_only, learning rate 0.001": ("local_only", {"phases": {"alone": {"learning_rate": 0.001}}}),
}


def chosen(name: str) -> tuple[StrategyFile, Strategy]:
    """The strategy of a choice, as a file and as it is trained."""
    base, patch = CHOICES[name]
    file = patched(base, {"base": base, **patch})
    return file, file.checked().model_copy(update={"validate_every": Run.validate_every})


def key(name: str, fold: int) -> str:
    """Hash of the strategy and of all the bundle's settings of a choice, the defaults too."""
    file, strategy = chosen(name)
    settings = settings_of(BUNDLE, {**SETTINGS, **file.overrides, "seed": fold})
    told = [BUNDLE, ROUNDS, strategy.model_dump(mode="json"), settings]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def federation_of(name: str, fold: int, sites: dict[str, Path], out: Path) -> Federation:
    """What is trained for a choice in one fold."""
    file, strategy = chosen(name)
    folder, settings = out / "choices" / key(name, fold), {"feature_store": out / "features"}
    overrides = {**SETTINGS, **file.overrides, "seed": fold}
    federation = Federation(BUNDLE, sites, strategy, folder, ROUNDS, overrides, settings)
    if file.kind == "federated":
        split = split_hash({site: read_split(path, fold) for site, path in sites.items()})
        federation.begun = federation.rounds_alone(out / "rounds", split)
    return federation


def measure(name: str, fold: int, sites: dict[str, Path], out: Path) -> dict[str, Any]:
    """Validation Dice of one choice in one fold."""
    started, (base, patch), (file, _) = time.monotonic(), CHOICES[name], chosen(name)
    federation = federation_of(name, fold, sites, out)

    def tell(line: str) -> None:
        print(f"  {line}", flush=True)

    run_federation(federation, tell, aggregated=file.kind == "federated")
    last = [note for note in federation.history() if note["round"] == ROUNDS]
    dice = {who: {note["site"]: note[f"val_dice_{who}"] for note in last} for who in ("global", "personal")}
    told = {"key": key(name, fold), "choice": name, "fold": fold, "base": base, "patch": patch}
    return {**told, "dice": dice, "seconds": time.monotonic() - started}


def is_current(row: dict[str, Any]) -> bool:
    """Whether a row is of a choice with the settings that it has now."""
    return row["choice"] in CHOICES and "fold" in row and row.get("key") == key(row["choice"], row["fold"])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, means over the folds of a choice, and one of the rows of older settings as they are."""
    from rich.console import Console
    from rich.table import Table

    sites = list(rows[0]["dice"]["personal"])
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
            table.add_row(line["choice"], line["folds"], *(f"{line[name]:.3f}" for name in means))
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
    data = options.data.resolve()
    sites = {path.name: path for path in sorted(data.iterdir()) if (path / "images").is_dir()}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for fold in options.folds:
        for name in options.only:
            if key(name, fold) in {row.get("key") for row in rows}:
                continue
            print(f"{name}, fold {fold}", flush=True)
            rows.append(measure(name, fold, sites, options.out))
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
