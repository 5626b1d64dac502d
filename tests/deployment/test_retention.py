"""What a site removes after a while: whole folders of finished jobs, never what says what left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.audit import audit
from pfedsam.deployment.retention import AUDIT_FILE, KEPT, outdated
from pfedsam.errors import PFedSAMError
from pfedsam.federated.records import CHECKED, LEFT, SENT_FILE, append_record
from pfedsam.storage.job_plan import CLIENT, PLAN_ID

SUBMITTED = "[E:1][T:2026-01-01][S:pfedsam][A:train#0]submit result OK\n"


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    kit = tmp_path / "site"
    for name in ("startup", "local", "transfer"):
        (kit / name).mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text("{}")
    (kit / "local" / "pfedsam.json").write_text("{}")
    (kit / "audit.log").write_text("[E:1][U:lead][A:submit_job]\n")
    for name in ("log.txt", "log.txt.1", "log.json-20260101.gz", "error_log.txt.2.gz", "log_fl.txt.1"):
        (kit / name).write_text("case-1")
    return kit


def add_job(kit: Path) -> Path:
    """A folder as a job leaves it: one result that left, with NVFlare's line for it."""
    job = kit / str(uuid.uuid4())
    (job / "bundle" / "eval").mkdir(parents=True)
    (job / "app_site" / "config").mkdir(parents=True)
    plan = {"id": PLAN_ID, "args": {"strategy": {"shared": ["lora_a"]}}}
    (job / "app_site" / "config" / CLIENT).write_text(json.dumps({"components": [plan]}))
    for name in ("meta.json", "log.txt", "log.txt.1.gz", "log.json", "error_log.txt", "bundle/eval/case-1.txt"):
        (job / name).write_text("{}")
    (job / "audit.log").write_text(SUBMITTED)
    told = {"task": "train", "round": 0, "tensors": 2, "bytes": 8, "reply": "OK"}
    append_record(job, SENT_FILE, {"stage": CHECKED, **told, "by_group": {"lora_a": 8}})
    append_record(job, SENT_FILE, {"stage": LEFT, **told})
    return job


def age(path: Path, days: float) -> None:
    for one in [path, *path.rglob("*")]:
        os.utime(one, (time.time() - days * 86400,) * 2)


def clean(kit: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["site", "clean", str(kit), "--older-than", "84", *more])
    assert done.exit_code in (0, 1) and not isinstance(done.exception, PFedSAMError), done.output
    return done.output


def test_an_old_job_goes_whole_and_its_audit_says_the_same_as_before(kit: Path) -> None:
    old, young = add_job(kit), add_job(kit)
    before = audit(kit, old.name)
    assert before.problems == [] and len(before.results) == 2
    age(old, 85)
    said = clean(kit, "--yes")
    assert str(old) in said and str(young) not in said
    assert not old.exists() and (young / "log.txt").exists()
    after = audit(kit / KEPT, old.name)
    assert (after.results, after.submitted, after.problems) == (before.results, before.submitted, [])
    kept = json.loads((kit / KEPT / old.name / AUDIT_FILE).read_text())
    assert kept == before.to_dict() and kept["actions"] and any(CLIENT in name for name in kept["hashes"])
    assert {path.name for path in (kit / KEPT).rglob("*") if path.is_file()} == {
        AUDIT_FILE,
        CLIENT,
        SENT_FILE,
        "audit.log",
        "meta.json",
    }
    # the audit of the others still finds them, and only them
    assert audit(kit, "").job == young.name


def test_everything_else_of_the_kit_stays(kit: Path) -> None:
    age(kit, 1000)
    clean(kit, "--yes")
    left = {str(path.relative_to(kit)) for path in kit.rglob("*") if path.is_file()}
    assert left == {"startup/fed_client.json", "local/pfedsam.json", "audit.log", "log.txt"}


def test_nothing_is_removed_without_a_yes(kit: Path) -> None:
    old = add_job(kit)
    age(old, 85)
    assert str(old) in clean(kit)
    assert (old / "log.txt").exists() and not (kit / KEPT).exists()


def test_a_job_that_runs_stays_however_old_its_files_are(kit: Path) -> None:
    old = add_job(kit)
    age(old, 1000)
    command = [sys.executable, "-c", "print('up', flush=True); input()", "-n", old.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        assert outdated(kit, 84) == []
        process.kill()
    assert [one.path for one in outdated(kit, 84)] == [old]


def test_one_young_file_keeps_a_whole_folder(kit: Path) -> None:
    old = add_job(kit)
    age(old, 1000)
    (old / "bundle" / "eval" / "case-1.txt").write_text("new")
    assert outdated(kit, 84) == []


def test_a_removal_that_was_interrupted_is_finished(kit: Path) -> None:
    old = add_job(kit)
    age(old, 85)
    clean(kit, "--yes")
    kept = (kit / KEPT / old.name / SENT_FILE).read_text()
    # what a call that was killed has left, without its meta.json
    (old / "bundle").mkdir(parents=True)
    (old / "bundle" / "case-2.txt").write_text("")
    age(old, 85)
    clean(kit, "--yes")
    assert not old.exists() and (kit / KEPT / old.name / SENT_FILE).read_text() == kept


def test_a_job_whose_records_nobody_can_read_goes_too_and_they_are_kept_as_they_are(kit: Path) -> None:
    old = add_job(kit)
    (old / "app_site" / "config" / CLIENT).write_text("{")
    age(old, 85)
    clean(kit, "--yes")
    assert not old.exists() and len((kit / KEPT / old.name / SENT_FILE).read_text().splitlines()) == 2
    assert "JSONDecodeError" in json.loads((kit / KEPT / old.name / AUDIT_FILE).read_text())["problems"][0]


def test_a_servers_kit_is_refused(kit: Path) -> None:
    (kit / "startup" / "fed_client.json").rename(kit / "startup" / "fed_server.json")
    with pytest.raises(PFedSAMError, match=r"E01.*server"):
        outdated(kit, 84)
