"""Time and memory of `pfedsam validate` on a site of large volumes.

    python tests/benchmarks/bench_validate.py --cases 300

Volumes of 256 x 256 x 150 (int16 with noise, label uint8, both .nii.gz) are written first. Then the real command runs
alone, on one core: processor seconds and peak memory of its largest process, with and without --quick, and of the same
command on a site of three of the cases, so that the start is told apart. Prints a table, writes results/validate.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pfedsam.data.splitting import write_datalist

AFFINE = np.diag([1.0, 1.0, 1.2, 1.0])
FEW = 3

#: Runs a command line and tells what it cost, as JSON on its last line: in a process that has no other children.
_MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"code": done.returncode, "seconds": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024,
                  "end": done.stdout.strip().splitlines()[-1]}))
"""


def write_site(folder: Path, cases: int, shape: tuple[int, ...]) -> None:
    """A head with a lesion and noise of its own in each case."""
    grid = np.meshgrid(*[np.linspace(-1, 1, size, dtype=np.float32) for size in shape], indexing="ij")
    head = 400 * ((grid[0] / 0.8) ** 2 + (grid[1] / 0.9) ** 2 < 1) * (1 + 0.2 * grid[0])
    blob = np.exp(-(((grid[0] - 0.3) / 0.2) ** 2) - ((grid[1] + 0.2) / 0.15) ** 2 - (grid[2] / 0.5) ** 2)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for case in track(range(cases), "writing volumes"):
        noise = np.random.default_rng(case).normal(0, 12, shape).astype(np.float32)
        values = (head + 500 * blob + noise * (head > 0)).clip(0).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / "images" / f"case-{case:03d}.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image((blob > 0.5).astype(np.uint8), AFFINE), folder / "labels" / f"case-{case:03d}.nii.gz"
        )


def cost(site: Path, *words: str) -> dict:
    """Processor seconds and peak bytes of `pfedsam validate` on one core."""
    command = [sys.executable, "-m", "pfedsam.cli", "validate", str(site), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, env=environment)
    found = json.loads(told.stdout.splitlines()[-1])
    if found["code"]:
        raise SystemExit(found["end"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 150))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "validate.json")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        site, small = Path(scratch) / "site", Path(scratch) / "few"
        write_site(site, options.cases, tuple(options.shape))
        for kind in ("images", "labels"):
            (small / kind).mkdir(parents=True)
            for path in sorted((site / kind).iterdir())[:FEW]:
                (small / kind / path.name).symlink_to(path)
        write_datalist(site)
        write_datalist(small)
        for name, words in (("files only (--quick)", ["--quick"]), ("with the first cases loaded", [])):
            few, all_of_them = cost(small, *words), cost(site, *words)
            each = (all_of_them["seconds"] - few["seconds"]) / (options.cases - FEW)
            rows.append(
                {
                    "what": name,
                    "seconds_a_case": each,
                    "seconds_of_3": few["seconds"],
                    "seconds": all_of_them["seconds"],
                    "peak": all_of_them["peak"],
                }
            )
    title = f"pfedsam validate, {options.cases} cases of {' x '.join(map(str, options.shape))}, one core"
    table = Table("", "s a case", "s in all", f"s of {FEW} cases", "peak MiB", title=title)
    for row in rows:
        table.add_row(
            row["what"],
            f"{row['seconds_a_case']:.3f}",
            f"{row['seconds']:.1f}",
            f"{row['seconds_of_3']:.1f}",
            f"{row['peak'] / 2**20:.0f}",
        )
    Console().print(table)
    machine = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    found = {"cases": options.cases, "shape": list(options.shape), "machine": machine, "rows": rows}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
