"""Peak memory of one training step of SAM ViT-B, each setting in a process of its own.

    python tests/benchmarks/bench_memory.py

Batch 1, bfloat16 autocast, all blocks adapted, random weights. Prints a table and writes results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from rich.console import Console
from rich.table import Table

from pfedsam.networks.adaptation import adapt
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import Roles, set_trainable
from pfedsam.training.trainer import PhaseTrainer

ROLES = Roles()
PHASE = {"name": "alone", "trains": ("shared", "personal"), "experts": True}


def step(side: int, blocks: str, checkpointing: bool) -> dict[str, float]:
    """One training step; peak resident memory of this process in GiB, and seconds."""
    network = SegmentAnything("vit_b", side, 1)
    adapt(network, "blocks", adapted_blocks=blocks if blocks == "all" else int(blocks))
    network.checkpointing = checkpointing
    set_trainable(network, ROLES, ("shared", "personal"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = {
        "image": torch.rand(1, 3, side, side),
        "label": (torch.rand(1, 1, side, side) > 0.5).float(),
        "index": torch.tensor([0]),
    }
    trainer = PhaseTrainer(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=[batch],
        network=network,
        loss_function=DiceCELoss(sigmoid=True, batch=True),
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-4),
        phase=PHASE,
        shared=list(ROLES.shared),
        personal=list(ROLES.personal),
        amp=True,
    )
    start = time.perf_counter()
    trainer.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gib": peak / 1024**2, "before_gib": before / 1024**2, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--one", nargs=2, metavar=("BLOCKS", "CHECKPOINTING"), help="one setting, as JSON")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options.side, options.one[0], options.one[1] == "on")))
        return
    rows = []
    for blocks, checkpointing in (("2", "off"), ("2", "on"), ("all", "on")):
        command = [sys.executable, __file__, "--side", str(options.side), "--one", blocks, checkpointing]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"adapted_blocks": blocks, "checkpointing": checkpointing, **found})
    table = Table(
        "adapted blocks", "checkpointing", "peak GiB", "of it before the step", "s", title=f"{options.side} px"
    )
    for row in rows:
        numbers = (f"{row['peak_gib']:.2f}", f"{row['before_gib']:.2f}", f"{row['seconds']:.0f}")
        table.add_row(row["adapted_blocks"], row["checkpointing"], *numbers)
    Console().print(table)
    options.output.parent.mkdir(exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    options.output.write_text(json.dumps({"side": options.side, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
