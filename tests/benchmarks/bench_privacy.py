"""What each privacy option costs in Dice, bytes and seconds.

    python tests/benchmarks/bench_privacy.py

A phantom federation of 3 sites, `lite_medsam` at 64 px, 16 rounds with a falling learning rate (strategy `annealed`)
and the final personal phase, through NVFlare's simulator, evaluated on the test cases: long enough that the end depends
little on rounding on the way. Each option runs with each seed (data, split, draws); the seed of the noise is the
operating system's. Prints a table and writes results/privacy.json; runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.simulation import Simulation, sent_bytes
from pfedsam.deployment.simulator import run
from pfedsam.evaluation.site import evaluate_site
from pfedsam.federated.privacy import DELTA, epsilon
from pfedsam.training.catalogue import find_strategy

BUNDLE, SITES, CASES, SHAPE, ROUNDS = "brain_lesion_mri", 3, 15, (96, 96, 12), 16
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "amp": True,
    "batch_size": 4,
    "augmentations": 2,
    "positives_per_case": 4,
    "negatives_per_case": 2,
}
#: A clip near the norm of the updates of this federation; noise as a multiple of it.
CLIP = 2.0
OPTIONS = {
    "none": Privacy(),
    "int8": Privacy(precision="int8"),
    f"clip {CLIP:g}, noise 0.01": Privacy(clip=CLIP, noise_multiplier=0.01),
    f"clip {CLIP:g}, noise 1": Privacy(clip=CLIP, noise_multiplier=1.0),
    "fp16": Privacy(precision="fp16"),
    f"clip {CLIP:g}": Privacy(clip=CLIP),
    f"clip {CLIP:g}, noise 0.001": Privacy(clip=CLIP, noise_multiplier=0.001),
}
RESULTS = Path(__file__).parent / "results" / "privacy.json"


def measure(option: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run of a federation and its evaluation."""
    data = folder / "data"
    write_phantom(data, SITES, CASES, SHAPE, seed)
    job = export_job(find_job("pfedsam"), folder / "exported", privacy=OPTIONS[option])
    settings = {**SETTINGS, "seed": seed}
    strategy = {**find_strategy("annealed").strategy, "validate_every": ROUNDS}
    simulation = Simulation(data, folder, str(job), "privacy", BUNDLE, ROUNDS, settings, strategy)
    started = time.monotonic()
    run(simulation)
    seconds = time.monotonic() - started
    found = [
        evaluate_site(BUNDLE, data / site, entry.file, overrides=settings, site=site, output_dir=folder)
        for site, entry in simulation.states().items()
    ]
    return {
        "option": option,
        "seed": seed,
        "global": float(np.mean([one.mean("global") for one in found])),
        "personal": float(np.mean([one.mean("personal") for one in found])),
        "bytes": max(max(rounds.values()) for rounds in sent_bytes(simulation).values()),
        "seconds": seconds,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds; differences to `none` of the same seed."""
    frame = pd.DataFrame(rows)
    wide = frame.pivot(index="option", columns="seed", values=["global", "personal"])
    table = Table("option", "epsilon", "global", "personal", "difference", "bytes", "seconds")
    table.title = f"{frame['seed'].nunique()} seed(s); difference of the personal Dice to none: mean (largest)"
    for option, privacy in OPTIONS.items():
        mine = frame[frame["option"] == option]
        if mine.empty:
            continue
        noise = privacy.noise_multiplier
        gap = (wide["personal"].loc[option] - wide["personal"].loc["none"]).dropna()
        table.add_row(
            option,
            f"{epsilon(noise, ROUNDS):.3g}" if noise else "-",
            *(f"{mine[model].mean():.3f}" for model in ("global", "personal")),
            f"{gap.mean():+.3f} ({gap.loc[gap.abs().idxmax()]:+.3f})",
            f"{mine['bytes'].max():,}",
            f"{mine['seconds'].mean():.0f}",
        )
    table.caption = f"epsilon at delta {DELTA:g} for one site's updates of {ROUNDS} rounds"
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="OPTION")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for seed in chosen.seeds:
        for option in chosen.only:
            if any((row["option"], row["seed"]) == (option, seed) for row in rows):
                continue
            folder = Path(tempfile.mkdtemp())
            try:
                rows.append(measure(option, seed, folder))
            finally:
                shutil.rmtree(folder)
            about = {"sites": SITES, "cases": CASES, "rounds": ROUNDS, "settings": SETTINGS}
            RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
            print(rows[-1], flush=True)
    show(rows)


if __name__ == "__main__":
    main()
