"""`pfedsam job export`: what the guide tells one to set is set by an option, and what is wrong is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.allowed_classes import needed_classes
from pfedsam.deployment.job_files import find_job, plan_settings, read_json, server_settings
from pfedsam.deployment.job_tracker import MLFLOW, RECEIVER_ID, TENSORBOARD
from pfedsam.deployment.jobs import CARRIED
from pfedsam.errors import PFedSAMError
from pfedsam.federated.scalars import EVENT
from pfedsam.parameters import TensorSpec
from pfedsam.storage.global_model import round_of, write_global_model
from pfedsam.storage.job_plan import SERVER
from pfedsam.training.catalogue import find_strategy


def export(out: Path, *words: str, job: str = "pfedsam") -> Result:
    return CliRunner().invoke(app, ["job", "export", job, str(out), "--locked", *words])


def exported(out: Path, *words: str, job: str = "pfedsam") -> Path:
    done = export(out, *words, job=job)
    assert done.exit_code == 0, done.output
    return out


def workflow(job: Path, name: str) -> dict[str, Any]:
    return next(one["args"] for one in server_settings(job)["workflows"] if one["id"] == name)


def test_settings_of_the_bundle_are_added_to_those_of_the_job(tmp_path: Path) -> None:
    before = plan_settings(find_job("pfedsam"))["overrides"] or {}
    job = exported(tmp_path / "job", "--set", "batch_size=2", "--set", "seed=7")
    assert plan_settings(job)["overrides"] == {**before, "batch_size": 2, "seed": 7}


def receiver(job: Path) -> dict[str, Any]:
    (found,) = [one for one in server_settings(job)["components"] if one["id"] == RECEIVER_ID]
    return found


def test_a_tracker_takes_the_place_of_the_one_before_and_a_server_allows_it(tmp_path: Path) -> None:
    before = receiver(exported(tmp_path / "before"))
    assert before["path"] == TENSORBOARD
    job = exported(tmp_path / "job", "--tracker", "mlflow", "--federation", "lesions")
    told = {"events": [EVENT], "kw_args": {"experiment_name": "lesions"}}
    assert receiver(job) == {"id": RECEIVER_ID, "path": MLFLOW, "args": told}
    assert MLFLOW in needed_classes(SERVER)
    uri = "https://curves.example.org:5000"
    job = exported(tmp_path / "job", "--tracker", f"mlflow={uri}", "--federation", "lesions")
    assert receiver(job)["args"] == {**told, "tracking_uri": uri}
    assert receiver(exported(tmp_path / "back", "--tracker", "tensorboard", job=str(job))) == before
    assert receiver(exported(tmp_path / "kept", job=str(job)))["path"] == MLFLOW


def test_a_job_without_a_tracker_gets_one(tmp_path: Path) -> None:
    job = exported(tmp_path / "job")
    file = job / "app" / "config" / SERVER
    config = read_json(file)
    config["components"] = [one for one in config["components"] if one["id"] != RECEIVER_ID]
    file.write_text(json.dumps(config))
    assert receiver(exported(tmp_path / "more", "--tracker", "mlflow", job=str(job)))["path"] == MLFLOW


@pytest.mark.parametrize("tracker", ["wandb", "", "tensorboard=x", "mlflow=", "mlflow=sqlite:///x.db", "mlflow=host"])
def test_another_tracker_is_refused(tracker: str, tmp_path: Path) -> None:
    done = export(tmp_path / "job", "--tracker", tracker)
    assert "E16" in str(done.exception) and not (tmp_path / "job").exists()


def test_a_tracker_with_a_password_is_refused_and_the_password_is_not_repeated(tmp_path: Path) -> None:
    done = export(tmp_path / "job", "--tracker", "mlflow=https://me:secret@curves.example.org")
    assert "E16" in str(done.exception) and "secret" not in str(done.exception)


def test_another_bundle(tmp_path: Path) -> None:
    assert plan_settings(exported(tmp_path / "job", "--bundle", "prostate_mri"))["bundle"] == "prostate_mri"


def test_another_strategy_brings_its_settings_its_rule_and_its_name(tmp_path: Path) -> None:
    file = find_strategy("fedprox")
    job = exported(tmp_path / "job", "--strategy", "fedprox", "--set", "seed=7", "--aggregation", "mean")
    plan = plan_settings(job)
    assert plan["strategy"] == {**file.strategy, "aggregation": "mean"}
    assert plan["overrides"] == {**file.overrides, "seed": 7}
    assert read_json(job / "meta.json")["name"] == "fedprox"
    paths = {one["id"]: one["path"] for one in server_settings(job)["components"]}
    assert paths["aggregator"].endswith("InTimeAccumulateWeightedAggregator")


def test_a_strategy_of_a_file_is_checked_and_written_without_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    told = {"description": "x", "strategy": {**find_strategy("fedavg_lora").strategy, "name": "mine"}, "overrides": {}}
    file.write_text(json.dumps(told))
    job = exported(tmp_path / "job", "--strategy", str(file))
    assert plan_settings(job)["strategy"]["name"] == "mine"
    assert not [path for path in job.rglob("*") if path.is_file() and str(file) in path.read_text()]


def test_the_rounds_wait_as_long_as_was_said_and_the_final_phase_as_before(tmp_path: Path) -> None:
    job = exported(tmp_path / "job", "--wait", "7200")
    assert workflow(job, "scatter_and_gather")["wait_time_after_min_received"] == 7200
    before = workflow(find_job("pfedsam"), "final_personal_phase")
    assert workflow(job, "final_personal_phase") == before


def test_a_first_global_model_is_carried_beside_the_configuration(tmp_path: Path) -> None:
    model = tmp_path / "mine.safetensors"
    write_global_model(model, {"a": torch.ones(2)}, "ab" * 32, {"a": TensorSpec((2,), "float32")}, -1)
    job = exported(tmp_path / "job", "--theta0", str(model))
    (persistor,) = [one for one in server_settings(job)["components"] if one["id"] == "persistor"]
    carried = job / "app" / "config" / CARRIED
    assert persistor["args"]["theta0"] == CARRIED and round_of(carried) == -1
    assert not (job / "app" / "custom").exists() and not carried.stat().st_mode & stat.S_IXUSR
    # it is the command's own: written again without --force
    exported(tmp_path / "job", "--theta0", str(model))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--set", "checkpoint=/etc/passwd"), "E18"),
        (("--set", "batch_size=$1+1"), "E18"),
        (("--set", "batch_size"), "E18"),
        (("--bundle", "nothing"), "E28"),
        (("--strategy", "nothing"), "E28"),
        (("--theta0", __file__), "E10"),
    ],
)
def test_what_no_site_could_run_is_refused_and_nothing_is_written(
    tmp_path: Path, words: tuple[str, ...], code: str
) -> None:
    done = export(tmp_path / "job", *words)
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == code
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("words", [("--wait", "-1"), ("--strategy", "local_only"), ("--theta0", "/nowhere")])
def test_a_wrong_option_is_named(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = export(tmp_path / "job", *words)
    assert done.exit_code == 2 and words[0] in done.output and not (tmp_path / "job").exists()
