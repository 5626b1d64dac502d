"""The audit of a job finds what its records do not allow, and the statement says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.dxo import MetaKey

from pfedsam.deployment.audit import audit, statement
from pfedsam.errors import ErrorCode
from pfedsam.federated.boundary import FINGERPRINT_KEY, GAP_KEY, METADATA, METADATA_BY_WEIGHTS, METRIC_DECIMALS, METRICS
from pfedsam.federated.packing import PACKED
from pfedsam.federated.records import CHECKED, LEFT, SCALARS, SENT_FILE, append_record
from pfedsam.federated.scalars import LISTED as LISTED_TAGS
from pfedsam.federated.scalars import PHASES, TAGS
from pfedsam.parameters import SHAREABLE_GROUPS
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE, PLAN_ID

JOB = "job-1"
LISTED = sorted([*METADATA, "initial_metrics.val_dice"])


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A site with a job that has sent one result."""
    config = tmp_path / JOB / "app_site" / "config"
    config.mkdir(parents=True)
    (config / CLIENT).write_text(json.dumps({"components": [{"id": PLAN_ID}]}))
    (config / PLAN_FILE).write_text(json.dumps({"strategy": {"shared": ["lora_a"]}}))
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


@pytest.mark.parametrize("weights", ["cases", "gaa"])
def test_a_number_that_the_plan_asks_for_is_fine_in_that_plan_alone(kit: Path, weights: str) -> None:
    plan = kit / JOB / "app_site" / "config" / PLAN_FILE
    plan.write_text(json.dumps({"strategy": {"shared": ["lora_a"], "weights": weights}}))
    for stage in (CHECKED, LEFT):
        record(kit, stage, metadata=[*LISTED, GAP_KEY])
    found = problems(kit)
    assert not found if weights == "gaa" else len(found) == 2 and all(GAP_KEY in one for one in found)


def test_the_statement_tells_the_number_of_one_kind_of_weights_and_how_to_leave_it_out() -> None:
    for weights, names in METADATA_BY_WEIGHTS.items():
        for name in names:
            row = row_of(f" {name}: ")
            assert f"`weights: {weights}`" in row and "`may_tell`" in row
            assert "from 0 to 1" in row and "2 significant digits" in row
    assert "pfedsam site init --may-tell ''" in statement()


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
    for word in (*METADATA, *METRICS, *SHAREABLE_GROUPS, *ErrorCode, *PHASES, "initial_metrics"):
        assert word in text, word
    for word in ("n_validation", "train_loss"):
        assert word not in text, word


def row_of(what: str) -> str:
    (row,) = [line for line in statement().splitlines() if line.startswith("| ") and what in line.split("|")[1]]
    return row


def test_the_statement_tells_the_precision_of_every_number() -> None:
    rounded = f"{METRIC_DECIMALS} decimals (steps of {10.0**-METRIC_DECIMALS:g})"
    assert rounded == "2 decimals (steps of 0.01)"
    for name in METRICS:
        assert rounded in row_of(f" {name}: ")
    for name in METADATA:
        assert "exact" in row_of(f" {name}: ")
    for name in (PACKED, MetaKey.PROCESSED_ALGORITHM):
        assert "packs or encrypts" in row_of(name)
    for tag in TAGS:
        assert (rounded if tag.decimals == METRIC_DECIMALS else "as computed") in row_of(f"`{tag.name}`"), tag
    assert all(precision in row_of("differences of shared tensors") for precision in ("float32", "fp16", "int8"))


def test_every_listed_tag_is_one_of_those_in_the_statement_and_its_dice_are_rounded() -> None:
    tags = ("val_dice_global", "val_dice_personal", "loss/final", "loss/phase_3", "distilled_share/train")
    for tag in (*tags, "gate_entropy/layer_11", "expert_share_3/layer_0"):
        (kind,) = [one for one in TAGS if re.fullmatch(one.pattern, tag)]
        assert LISTED_TAGS.fullmatch(tag) and (kind.decimals is not None) == tag.startswith("val_dice")
    assert not any(LISTED_TAGS.fullmatch(tag) for tag in ("loss/radiology", "val_dice", "loss/final/x"))


def test_the_statement_says_what_two_sites_and_curves_reveal() -> None:
    text = " ".join(statement().split())
    for words in (
        "Two sites: each can compute the other's difference",
        "some 2e-7",
        "The setting `least_sites` (3 in a kit",
        "a hostile server can name sites that do not exist",
        "`least_validation_cases` of the site's settings (5 in a kit",
        "Curves** (off by default outside the simulator",
        "how its images divide among the experts",
        "between 1e-05 and 0.5 of the network's input",
        "a difference between two jobs is the number of new patients",
    ):
        assert words in text, words


def test_the_statement_says_where_each_thing_stays() -> None:
    rows = [line for line in statement().splitlines() if line.startswith("| ")]
    for what, where in (
        ("images", "data folder"),
        ("personal tensors", "state root"),
        ("logs", "startup kit"),
        ("predictions", "`--out`"),
    ):
        assert any(row.startswith(f"| {what}") and where in row.split("|")[2] for row in rows), what
