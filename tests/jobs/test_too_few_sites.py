"""Two sites in NVFlare's simulator: a site that asks for three refuses, and a server that promised three stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated import Job, Run, simulate


def two_sites(folder: Path, data: Path, *, asked: int, promised: int) -> Run:
    """A run of two sites whose settings ask for so many, of a job that promises so many."""
    settings = folder / "ws" / "local" / "pfedsam.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"least_sites": asked}))
    job = Job(recorded=False)
    job.plan["least_sites"] = promised
    return simulate(folder, job, data)


@pytest.mark.slow
def test_sites_that_ask_for_a_third_refuse_with_a_code(federation: Path, tmp_path: Path) -> None:
    run = two_sites(tmp_path, federation, asked=3, promised=3)
    for site in ("site-1", "site-2"):
        assert "E27: 2 site(s) take part, this site asks for at least 3" in run.site_log(site)
    assert "SITE_REFUSED:E27" in run.server_log()
    assert not run.global_model.exists()


@pytest.mark.slow
def test_a_round_of_fewer_sites_than_were_promised_never_becomes_the_global_model(
    federation: Path, tmp_path: Path
) -> None:
    # the server was told to wait for two, and its job promised three
    run = two_sites(tmp_path, federation, asked=2, promised=3)
    assert "round 0: global Dice" in run.site_log("site-1"), "the sites take part"
    assert "E27: round 0 has contributions of ['site-1', 'site-2'] only" in run.server_log()
    assert not run.global_model.exists()
