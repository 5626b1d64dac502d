"""Every checked-in job runs to its end in NVFlare's simulator as it stands, with the smallest network and one epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from simulated import ROOT, Job, simulate

from pfedsam.storage.site_model import read

JOBS = sorted(path.parent.name for path in (ROOT / "jobs").glob("*/meta.json"))


def test_there_are_thirteen_jobs() -> None:
    assert len(JOBS) == 13


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_to_its_end(name: str, federation: Path, tmp_path: Path) -> None:
    job = Job(recorded=False, source=ROOT / "jobs" / name)
    own = json.loads((job.source / "app/config/plan.json").read_text())
    for phase in (*own["strategy"]["phases"], *own["strategy"].get("final", [])):
        phase["epochs"] = 1
    job.plan["strategy"] = own["strategy"]
    run = simulate(tmp_path, job, federation)
    assert run.exit_code == 0, run.output[-3000:]
    assert load_file(run.global_model)
    for site in ("site-1", "site-2"):
        info = read(run.state_folder(site) / "state.safetensors").info
        assert info["strategy"] == own["strategy"]["name"]
        assert info["final"]
        assert [one["task"] for one in run.sent(site)].count("train") == 1
    results = json.loads((run.global_model.parent.parent / "cross_site_val" / "cross_val_results.json").read_text())
    assert {model for models in results.values() for model in models} >= {"SRV_global_model"}
