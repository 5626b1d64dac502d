"""A site with a large archive: what a start costs, in the first job and in the next, and the peak memory.

    python tests/benchmarks/bench_archive.py          # 300 volumes of 256 x 256 x 150 voxels, 128 and 256 px
    python tests/benchmarks/bench_archive.py --volumes 600 --sizes 256 --settings '{"checkpointing": true}'

Volumes are noise inside a box, written as .nii.gz into a temporary folder (5 MB each). Each job is a process of its own
that does what the learner does: check, prepare, open the bundle; then some training steps and one validation case.
Processor seconds count from the start of the process, imports included; the first step is counted without the
validation that a strategy may ask for before it. Peak memory is that of the whole job. Appends to results/archive.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = (256, 256, 150)
GIB = 1024**2  # of the KiB that the kernel counts
RESULTS = Path(__file__).parent / "results" / "archive.json"
#: (kept between jobs, its place in a series on one folder)
JOBS = ("nothing kept", "first", "second")


def write_site(folder: Path, count: int) -> None:
    """Volumes that differ in the first slice only; the other slices are compressed once."""
    import nibabel
    import numpy as np

    random = np.random.default_rng(0)
    image = np.zeros(SHAPE, dtype=np.int16)
    image[48:208, 48:208, 1:149] = random.normal(300, 60, (160, 160, 148)).astype(np.int16)
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[110:140, 110:140, 60:85] = 1
    for kind, values in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True)
        header = nibabel.Nifti1Image(values, np.eye(4)).header
        header["vox_offset"] = 352
        start = header.binaryblock + b"\0" * 4
        body = gzip.compress(values[..., 1:].tobytes(order="F"), 1)
        for number in range(count):
            slice_ = values[..., 0].copy()
            slice_.flat[0] = number if kind == "images" else 0
            first = gzip.compress(start + slice_.tobytes(order="F"), 1)
            (folder / kind / f"case-{number:04d}.nii.gz").write_bytes(first + body)


def job(site: str, out: str, prepared: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """One job at the site, in this process."""
    from ignite.engine import Events

    from pfedsam.parameters import shared_state
    from pfedsam.training.catalogue import find_strategy
    from pfedsam.training.left_out import leave_out
    from pfedsam.training.preparation import require_trainable
    from pfedsam.training.site import SiteTrainer

    bundle, kept = "brain_lesion_mri", Path(prepared) if prepared else None
    require_trainable(Path(site), bundle, settings, prepared=kept)
    checked, peak_checked = time.process_time(), peak_gib()
    local = SiteTrainer(bundle, site, find_strategy("pfedsam").checked(), settings, out, prepared=kept)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    opened, peak_opened, stepped = time.process_time(), peak_gib(), []
    trainer = local.trainer

    @trainer.on(Events.ITERATION_COMPLETED)
    def _count() -> None:
        stepped.append(time.process_time())
        if len(stepped) >= steps:
            trainer.terminate()

    local.train(0)
    peak_trained = peak_gib()
    leave_out(local.evaluator, local.validation_cases, range(1, len(local.validation_cases)))
    local.validate(experts=False)
    return {
        "check_s": checked,
        "open_s": opened,
        "first_step_s": stepped[0],
        "peak_gib_after": {"check": peak_checked, "open": peak_opened, "steps": peak_trained},
        "peak_gib": peak_gib(),
        "cases": [len(local.cases), len(local.validation_cases)],
        "cache": trainer.feature_cache.summary() if trainer.feature_cache else "",
    }


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


def measured(site: Path, out: Path, prepared: Path | None, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """What a job in a process of its own says of itself."""
    words = [str(site), str(out), str(prepared or ""), json.dumps(settings), str(steps)]
    done = subprocess.run([sys.executable, __file__, "--job", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table and append to the results."""
    if sys.argv[1:2] == ["--job"]:
        site, out, prepared, settings, steps = sys.argv[2:]
        print(json.dumps(job(site, out, prepared, json.loads(settings), int(steps))))
        return
    from rich.console import Console
    from rich.table import Table

    from pfedsam.comparison.provenance import commit, machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=300)
    parser.add_argument("--sizes", default="128,256", help="pixels of the network's input")
    parser.add_argument("--jobs", default=",".join(JOBS[1:]), help=f"some of {', '.join(JOBS)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of the bundle, as JSON")
    asked = parser.parse_args()
    console = Console()
    table = Table("volumes", "px", "job", "check s", "open s", "first step s", "peak GiB", title="processor seconds")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with console.status(f"writing {asked.volumes} volumes"):
            write_site(folder / "site", asked.volumes)
        for size in map(int, asked.sizes.split(",")):
            for name in asked.jobs.split(","):
                prepared = None if name == JOBS[0] else folder / f"prepared-{size}"
                with console.status(f"{size} px, {name} job"):
                    settings = {"image_size": size, **asked.settings}
                    found = measured(folder / "site", folder / "out", prepared, settings, asked.steps)
                rows.append({"volumes": asked.volumes, "px": size, "settings": asked.settings, "job": name, **found})
                console.print(rows[-1])
                numbers = [f"{found[key]:.1f}" for key in ("check_s", "open_s", "first_step_s")]
                table.add_row(str(asked.volumes), str(size), name, *numbers, f"{found['peak_gib']:.2f}")
    console.print(table)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    record = {"commit": commit(), "machine": machine(), "shape": SHAPE, "steps": asked.steps, "rows": rows}
    RESULTS.write_text(json.dumps([*before, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
