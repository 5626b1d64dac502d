"""What encrypted updates (CKKS) cost in bytes, seconds and precision.

    python tests/benchmarks/bench_encryption.py

The same job twice through one provisioned federation of 2 sites with NVFlare's `HEBuilder`, as real processes on this
machine: plain and encrypted, `lite_medsam` at 64 px on a phantom, the same seed. Prints a table and writes
results/encryption.json: bytes that a site sent in a round, seconds of the whole job, mean Dice of the personal models,
and how far the final shared tensors at the sites are from the plain job's.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.admin import connect, fetch, follow, submit
from pfedsam.deployment.audit import audit
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.processes import Deployment
from pfedsam.evaluation.site import evaluate_site
from pfedsam.storage.site_model import read
from pfedsam.storage.state_list import list_states

PROJECT = Path(__file__).parents[2] / "poc_workspace" / "project.yml"
BUILDER = {"path": "nvflare.lighter.impl.he.HEBuilder", "args": {"poly_modulus_degree": 8192, "scale_bits": 40}}
OPTIONS = {"plain": Privacy(), "encrypted": Privacy(encrypt=True)}
SETTINGS: dict[str, Any] = {
    "image_size": 64,
    "adapted_blocks": 1,
    "batch_size": 2,
    "augmentations": 1,
    "positives_per_case": 4,
    "negatives_per_case": 2,
    "cache_limit_gb": 1,
    "seed": 0,
}
BUNDLE, CASES, SHAPE = "brain_lesion_mri", 9, (96, 96, 12)
RESULTS = Path(__file__).parent / "results" / "encryption.json"


def measure(
    option: str, deployment: Deployment, session: Any, data: dict[str, Path], folder: Path, rounds: int
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """One job, from its submission to its end, and the sites' final models."""
    plan = {"federation": option, "overrides": SETTINGS}
    server = {"num_rounds": rounds, "min_clients": len(data)}
    job = export_job(
        find_job("pfedsam"), folder / option, locked=True, plan=plan, server=server, privacy=OPTIONS[option]
    )
    started = time.monotonic()
    job_id = submit(session, job)
    follow(session, job_id, timeout=3600)
    seconds = time.monotonic() - started
    result = fetch(session, job_id, folder / "results")
    if not result.completed:
        raise SystemExit(f"{option}: {result.problem()}")
    sent = [
        one["bytes"]
        for site in data
        for one in audit(deployment.kit(site), job_id).results
        if one["task"] == "train" and one.get("tensors")
    ]
    states = {
        site: entry.file
        for site in data
        for entry in list_states(deployment.state_root(site))
        if entry.federation == option
    }
    found = [
        evaluate_site(BUNDLE, data[site], file, overrides=SETTINGS, site=site, output_dir=folder)
        for site, file in states.items()
    ]
    row = {
        "option": option,
        "bytes": max(sent),
        "seconds": seconds,
        "global": float(np.mean([one.mean("global") for one in found])),
        "personal": float(np.mean([one.mean("personal") for one in found])),
    }
    return row, read(next(iter(states.values()))).shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    rows, models = [], []
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        content = yaml.safe_load(PROJECT.read_text())
        # before the signatures: the context is signed, too
        content["builders"].insert(-1, BUILDER)
        (folder / "project.yml").write_text(yaml.safe_dump(content))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        deployment = Deployment(folder / "runtime", folder / "project.yml", port)
        write_phantom(folder / "data", len(deployment.sites), CASES, SHAPE)
        data = {site: folder / "data" / f"site-{number}" for number, site in enumerate(deployment.sites, start=1)}
        deployment.provision()
        deployment.init(data, {"federations": list(OPTIONS)})
        try:
            deployment.start()
            with connect(deployment.admin()) as session:
                deployment.wait(session)
                for option in OPTIONS:
                    row, shared = measure(option, deployment, session, data, folder, rounds)
                    rows.append(row)
                    models.append(shared)
                    print(row, flush=True)
        finally:
            deployment.stop()
    plain, encrypted = models
    gap = max(float((tensor.float() - encrypted[name].float()).abs().max()) for name, tensor in plain.items())
    RESULTS.write_text(
        json.dumps({"rounds": rounds, "settings": SETTINGS, "largest_gap": gap, "rows": rows}, indent=2) + "\n"
    )
    table = Table("option", "bytes", "seconds", "global", "personal")
    for row in rows:
        dice = (f"{row[model]:.3f}" for model in ("global", "personal"))
        table.add_row(row["option"], f"{row['bytes']:,}", f"{row['seconds']:.0f}", *dice)
    table.caption = f"{rounds} rounds; final shared tensors differ by at most {gap:.2g}"
    Console().print(table)


if __name__ == "__main__":
    main()
