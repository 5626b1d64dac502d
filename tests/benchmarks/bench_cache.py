"""How much time the feature cache saves, measured beside what the number of operations predicts.

    python tests/benchmarks/bench_cache.py

Trains LiteMedSAM's network on random slices, once with and once without the cache, epoch by epoch in turn, so that
both see the same load of the machine. `start` begins with an empty cache, so its first epoch fills it; `filled` is an
epoch in which every slice is in the cache. The prediction counts the operations of matrix products and convolutions:
trunk forward, head forward and backward, and the teacher's head, which runs once for each slice in a phase.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from pfedsam.data.slices import SliceDataset
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, set_trainable
from pfedsam.training.extra_losses import Distillation
from pfedsam.training.feature_cache import FeatureCache
from pfedsam.training.phase import Phase
from pfedsam.training.trainer import PhaseTrainer

RESULTS = Path(__file__).parent / "results" / "cache.json"
ROLES = Roles()
#: A run calls `run` once for each epoch, so that the variants can take turns.
PHASES = {
    "personal": Phase(
        name="personal",
        trains=("personal",),
        experts=True,
        distillation=Distillation(warmup_rounds=0, quality_gate=False),
    ),
    "shared": Phase(name="shared", trains=("shared",), experts=False),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="slices of an epoch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="of an image in pixels")
    parser.add_argument("--epochs", type=int, default=4, help="local epochs of the longer run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def slices(number: int, side: int) -> SliceDataset:
    """One volume, every slice of it labelled."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, side, side, number, generator=generator)
    label = torch.zeros(1, side, side, number)
    label[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    return SliceDataset([{"image": image, "label": label}], lambda item: dict(item), grey="same")


def trainer(data: SliceDataset, phase: Phase, options: argparse.Namespace, cached: bool) -> PhaseTrainer:
    network = build_network("lite_medsam", options.side)
    return PhaseTrainer(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=DataLoader(data, batch_size=options.batch),
        network=network,
        loss_function=DiceCELoss(sigmoid=True, batch=True),
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        phase=phase.model_dump(),
        shared=list(ROLES.shared),
        personal=list(ROLES.personal),
        feature_cache=FeatureCache() if cached else None,
    )


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(phase: Phase, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each epoch, with and without the cache."""
    data = slices(options.images, options.side)
    # one small batch of each phase first: allocator and kernels are warm then
    trainer(slices(1, options.side), phase, options, cached=False).run()
    variants = {"uncached": trainer(data, phase, options, False), "cached": trainer(data, phase, options, True)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for epoch in range(options.epochs):
        for name in sorted(variants, reverse=epoch % 2 == 0):
            times[name].append(seconds(variants[name].run))
    steps = {name: variant.report.losses for name, variant in variants.items()}
    assert all(abs(a - b) < 1e-4 for a, b in zip(*steps.values(), strict=True)), "the variants train differently"
    return times


def operations(network: SegmentAnything, phase: Phase, side: int) -> dict[str, int]:
    """Operations for one image: trunk, head forward and backward, teacher."""
    set_trainable(network, ROLES, [role for role in phase.trains if role != "copy"])
    network.set_experts(phase.experts)
    counts = {}
    with FlopCounterMode(display=False) as counter:
        features = network.trunk(torch.rand(1, 3, side, side))
    counts["trunk"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        network.head(features).sum().backward()
    counts["head"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), network.experts(False):
        network.head(features)
    counts["teacher"] = counter.get_total_flops() if phase.distillation else 0
    return counts


def predicted(counts: dict[str, int], epochs: int, filled: bool) -> float:
    """Ratio of the operations without and with the cache."""
    # an epoch with a filled cache is no first epoch, so the teacher's logits are there too
    teacher = 0 if filled else counts["teacher"]
    head = epochs * counts["head"] + teacher
    return (epochs * counts["trunk"] + head) / ((0 if filled else counts["trunk"]) + head)


def rows(name: str, times: dict[str, list[float]], counts: dict[str, int], epochs: int) -> list[dict[str, Any]]:
    def row(run: str, number: int, uncached: float, cached: float) -> dict[str, Any]:
        expected = predicted(counts, number, run == "filled")
        return {
            "phase": name,
            "cache": run,
            "epochs": number,
            "uncached_s": uncached,
            "cached_s": cached,
            "measured": uncached / cached,
            "predicted": expected,
            "measured_over_predicted": uncached / cached / expected,
        }

    found = [
        row("start", number, sum(times["uncached"][:number]), sum(times["cached"][:number])) for number in (1, epochs)
    ]
    if epochs > 1:
        found.append(row("filled", 1, *(statistics.median(times[variant][1:]) for variant in ("uncached", "cached"))))
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    network = build_network("lite_medsam", options.side)
    found, flops = [], {}
    for name, phase in PHASES.items():
        flops[name] = operations(network, phase, options.side)
        found += rows(name, measure(phase, options), flops[name], options.epochs)

    title = f"LiteMedSAM, {options.side} px, {options.images} slices, batch {options.batch}, threads {options.threads}"
    table = Table("phase", "cache", "epochs", "uncached s", "cached s", "measured", "predicted", "m / p", title=title)
    for line in found:
        numbers = (line[key] for key in ("measured", "predicted", "measured_over_predicted"))
        table.add_row(
            line["phase"],
            line["cache"],
            str(line["epochs"]),
            f"{line['uncached_s']:.1f}",
            f"{line['cached_s']:.1f}",
            *(f"{number:.2f}" for number in numbers),
        )
    Console().print(table)

    settings = {key: value for key, value in vars(options).items() if key != "output"}
    machine = {"torch": torch.__version__, "cpu_count": os.cpu_count(), "machine": platform.machine()}
    giga = {name: {part: round(count / 1e9, 3) for part, count in counts.items()} for name, counts in flops.items()}
    result = {"settings": settings, "machine": machine, "gflops_per_image": giga, "rows": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
