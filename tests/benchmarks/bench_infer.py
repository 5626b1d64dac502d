"""Peak memory and time of `pfedsam infer` on a large volume, with 1 and with 8 slices a batch.

    python tests/benchmarks/bench_infer.py

512 x 512 x 200, lite_medsam at 128 px, experts with random values, by torch (`bench_speed.py` has ONNX Runtime). Each
setting is the real command in a process of its own. Prints a table and writes results/infer.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from pfedsam.bundles import network_of
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, write

BUNDLE = "brain_lesion_mri"


def peak_of(command: list[str]) -> tuple[float, float]:
    """Largest resident memory of a command in GiB, sampled, and its seconds."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, seen.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
        assert process.stderr is not None
        error = process.stderr.read()
    if process.returncode:
        raise SystemExit(error[-2000:])
    return peak / 2**30, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 200))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "infer.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        random = np.random.default_rng(0)
        values = random.normal(100, 20, options.shape).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 1.0, 1.0])), folder / "large.nii")
        told = {"bundle": BUNDLE, "overrides": {}, "round": 0, "final": True}
        write(folder / "model.safetensors", SiteModel.of(network_of(BUNDLE), Roles(), **told))
        for batch in (1, 8):
            command = [sys.executable, "-m", "pfedsam.cli", "infer", str(folder / "large.nii")]
            command += ["--model", str(folder / "model.safetensors"), "--out", str(folder / "out"), "--force"]
            command += ["--engine", "torch"]
            peak, seconds = peak_of([*command, "--set", f"val_batch_size={batch}"])
            rows.append({"batch": batch, "peak_gib": peak, "seconds_per_slice": seconds / options.shape[2]})
    table = Table("slices a batch", "peak GiB", "s a slice", title=" x ".join(str(n) for n in options.shape))
    for row in rows:
        table.add_row(str(row["batch"]), f"{row['peak_gib']:.2f}", f"{row['seconds_per_slice']:.2f}")
    Console().print(table)
    options.output.parent.mkdir(exist_ok=True)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    found = {"shape": list(options.shape), "machine": machine, "rows": rows}
    options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
