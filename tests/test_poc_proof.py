"""What `pfedsam poc run` says it has proved comes from the records of the sites, and fails if they do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfedsam.commands.poc_results import NOT_PROVED, proofs, show_proof
from pfedsam.deployment.processes import Deployment
from pfedsam.errors import PFedSAMError
from pfedsam.federated.records import CHECKED, LEFT, SENT_FILE, append_record
from pfedsam.storage.job_plan import PLAN_FILE

PROJECT = Path(__file__).resolve().parents[1] / "poc_workspace" / "project.yml"


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    """Each site has done a job of one round: one result left, three personal tensors stayed."""
    made = Deployment(tmp_path, PROJECT)
    for site in made.sites:
        run = made.kit(site) / "job-1"
        (run / "app_site" / "config").mkdir(parents=True)
        (run / "meta.json").write_text("{}")
        (run / "app_site" / "config" / PLAN_FILE).write_text('{"strategy": {"share": ["lora_a"]}}')
        append_record(run, SENT_FILE, {"stage": CHECKED, "task": "train", "excluded": 3, "by_group": {}})
    return made


def test_what_left_and_what_stayed_is_counted(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(proofs(deployment))
    assert re.search(r"all 0 results .* kept 6 personal tensors back", said) and "nothing is left running" in said
    show_proof(deployment)
    shown = capsys.readouterr().out
    assert shown.index("Proved") < shown.index("Not proved") and all(one in shown for one in NOT_PROVED)


def test_a_result_that_the_filter_did_not_see_proves_nothing(deployment: Deployment) -> None:
    site = deployment.sites[1]
    append_record(deployment.kit(site) / "job-1", SENT_FILE, {"stage": LEFT, "task": "train", "metadata": []})
    with pytest.raises(PFedSAMError, match=f"E22.*audit of site {site}"):
        list(proofs(deployment))
