"""The audit of a job finds what its records do not allow, and the statement says what the code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pfedsam.errors import CODES
from pfedsam.federated.audit import audit, statement
from pfedsam.federated.boundary import FINGERPRINT_KEY, METADATA, METRICS
from pfedsam.federated.jobs import CLIENT
from pfedsam.federated.packing import PACKED
from pfedsam.federated.plan import PLAN_ID
from pfedsam.federated.records import CHECKED, LEFT, SCALARS, SENT_FILE, append_record
from pfedsam.parameters import CEILING

JOB = "job-1"
LISTED = sorted([*METADATA, "initial_metrics.val_dice"])


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A site with a job that has sent one result."""
    config = tmp_path / JOB / "app_site" / "config"
    config.mkdir(parents=True)
    plan = {"id": PLAN_ID, "args": {"strategy": {"shared": ["lora_a"]}}}
    (config / CLIENT).write_text(json.dumps({"components": [plan]}))
    (tmp_path / JOB / "meta.json").write_text("{}")
    (tmp_path / JOB / "audit.log").write_text("[E:1][T:2026-01-01][S:pfedsam][A:train#0]submit result OK\n")
    return tmp_path


def record(kit: Path, stage: str, **told: Any) -> None:
    append_record(
        kit / JOB, SENT_FILE, {"stage": stage, "task": "train", "round": 0, "bytes": 8, "reply": "OK", **told}
    )


def problems(kit: Path) -> list[str]:
    return audit(kit, JOB).problems


def test_listed_names_are_fine_and_the_audit_shows_them(kit: Path) -> None:
    record(kit, CHECKED, by_group={"lora_a": 8}, metadata=LISTED)
    record(kit, LEFT, metadata=[*LISTED, PACKED])
    found = audit(kit, JOB)
    assert found.problems == []
    assert found.to_dict()["results"][0]["metadata"] == LISTED


@pytest.mark.parametrize("name", ["n_validation", "patient", "initial_metrics.train_loss"])
@pytest.mark.parametrize("stage", [CHECKED, LEFT])
def test_metadata_that_is_not_listed_is_a_problem(kit: Path, name: str, stage: str) -> None:
    for one in (CHECKED, LEFT):
        record(kit, one, metadata=[*LISTED, name] if one == stage else LISTED)
    (problem,) = problems(kit)
    assert name in problem and stage in problem and FINGERPRINT_KEY not in problem


def test_what_is_added_behind_the_allow_list_has_not_passed_it(kit: Path) -> None:
    record(kit, CHECKED, metadata=[*LISTED, PACKED])
    record(kit, LEFT, metadata=[*LISTED, PACKED])
    (problem,) = problems(kit)
    assert PACKED in problem and CHECKED in problem


def test_the_scalars_of_a_job_are_counted_over_all_of_its_records(kit: Path) -> None:
    record(kit, SCALARS, tags={"loss/global": 1})
    record(kit, CHECKED)
    record(kit, LEFT)
    record(kit, SCALARS, tags={"val_dice_global": 1})
    record(kit, SCALARS, tags={"loss/global": 3})
    found = audit(kit, JOB)
    (scalars,) = found.stage(SCALARS)
    assert scalars["tags"] == {"loss/global": 4, "val_dice_global": 1}
    assert found.problems == [] and len(found.results) == 3


def test_the_statement_names_everything_that_the_allow_list_lets_pass() -> None:
    text = statement()
    for word in (*METADATA, *METRICS, *CEILING, *CODES, "initial_metrics", "3 decimals"):
        assert word in text, word
    for word in ("n_validation", "train_loss"):
        assert word not in text, word


def test_the_statement_says_where_each_thing_stays() -> None:
    rows = [line for line in statement().splitlines() if line.startswith("| ")]
    for what, where in (
        ("images", "data folder"),
        ("personal tensors", "state root"),
        ("logs", "startup kit"),
        ("predictions", "`--out`"),
    ):
        assert any(row.startswith(f"| {what}") and where in row.split("|")[2] for row in rows), what
