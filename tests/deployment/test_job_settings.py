"""A job folder, a plan and a recipe with what no server or site could run: refused when it is read or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from typer.testing import CliRunner

from pfedsam.bundles import folder
from pfedsam.cli import app
from pfedsam.deployment.allowed_classes import classes_of, needed_classes
from pfedsam.deployment.job_files import META, find_job, plan_settings, server_settings
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.job_terms import job_terms
from pfedsam.deployment.jobs import export_job, make_job
from pfedsam.deployment.recipe import PFedSAMRecipe
from pfedsam.deployment.simulation import Simulation
from pfedsam.errors import PFedSAMError
from pfedsam.federated.plan import Plan
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE, SERVER
from pfedsam.training.aggregation import RULES
from pfedsam.training.catalogue import find_strategy

SOURCE = folder("jobs") / "pfedsam"
MEAN = "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "job"))


def config_of(job: Path, name: str = SERVER) -> Path:
    return job / "app" / "config" / name


#: The least and the most of each number of the server, and what lies beyond them.
NUMBERS = [
    ("num_rounds", 0, 10_000, -1, 10_001),
    ("start_round", 0, 10_000, -1, 10_001),
    ("min_clients", 1, 1000, 0, 1001),
    ("validation_timeout", 0, 2_592_000, -1, 2_592_001),
    ("final_phase_timeout", 0, 2_592_000, -1, 2_592_001),
]


@pytest.mark.parametrize(("key", "least", "most", "below", "above"), NUMBERS, ids=[one[0] for one in NUMBERS])
def test_numbers_of_the_server_have_two_ends(
    key: str, least: int, most: int, below: int, above: int, tmp_path: Path, job: Path
) -> None:
    for number, value in enumerate((least, most)):
        assert server_settings(export_job(SOURCE, tmp_path / str(number), server={key: value}))[key] == value
    for value in (below, above, float("nan"), True, "3", [3], None):
        with pytest.raises(PFedSAMError, match=rf"E16.*{key}"):
            export_job(SOURCE, tmp_path / "out", server={key: value})
        config_of(job).write_text(json.dumps({**json.loads(config_of(SOURCE).read_text()), key: value}))
        with pytest.raises(PFedSAMError, match=rf"E16.*{key}"):
            find_job(str(job))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-1, 2_592_001, float("nan"), [1], None, True])
def test_seconds_of_a_workflow_are_in_a_range(value: Any, job: Path) -> None:
    config = json.loads(config_of(job).read_text())
    config["workflows"][0]["args"]["wait_time_after_min_received"] = value
    config_of(job).write_text(json.dumps(config))
    with pytest.raises(PFedSAMError, match=r"E16.*wait_time_after_min_received"):
        find_job(str(job))


@pytest.mark.parametrize("content", ["[1]", "3", "null", "{", "", '"text"', "[" * 100_000])
@pytest.mark.parametrize("name", [META, SERVER, CLIENT, PLAN_FILE])
def test_a_file_of_another_shape_is_named(name: str, content: str, job: Path, tmp_path: Path) -> None:
    (job / name if name == META else config_of(job, name)).write_text(content)
    with pytest.raises(PFedSAMError, match=rf"E29.*{name}"):
        if name == CLIENT:
            classes_of(find_job(str(job)))
        else:
            make_job("pfedsam", tmp_path / "out", template=str(job))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"components": 3},
        {"components": [3, {}, {"id": "other"}]},
        {"components": [{"id": "plan", "args": [1]}]},
        {"components": [{"id": "plan", "args": {"bundle": ["a"], "strategy": {}}}]},
        {"components": [{"id": "plan", "args": {"bundle": "a", "strategy": [1]}}]},
        {"components": [{"id": "plan", "args": {"bundle": "a", "strategy": {}, "overrides": [1]}}]},
    ],
    ids=str,
)
def test_a_configuration_without_a_plan_of_ours_is_refused(content: dict[str, Any], job: Path) -> None:
    config_of(job).write_text(json.dumps(content))
    for call in (lambda: find_job(str(job)), lambda: plan_settings(job), lambda: export_job(job, job.parent / "out")):
        with pytest.raises(PFedSAMError, match="E29"):
            call()
    assert not (job.parent / "out").exists()


WRONG_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"overrides": {"image_sise": 96}}, "E18"),
    ({"overrides": {"top_k": 9}}, "E18"),
    ({"overrides": [1]}, "E1[68]"),
    ({"bundle": ["brain_lesion_mri"]}, "E28"),
    ({"bundle": "knee"}, "E28"),
    ({"strategy": [1]}, "E16"),
    ({"strategy": {"phases": 3}}, "E16"),
    ({"federation": ["a"]}, "E16"),
    ({"federation": "../a"}, "E16"),
    ({"other": 1}, "E29"),
]


@pytest.mark.parametrize(("plan", "code"), WRONG_PLANS, ids=str)
def test_a_wrong_plan_is_not_written(plan: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=code):
        export_job(SOURCE, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("plan", "code"), [one for one in WRONG_PLANS if "other" not in one[0]], ids=str)
def test_a_wrong_plan_that_came_all_the_same_is_an_error_of_ours(plan: dict[str, Any], code: str) -> None:
    told: dict[str, Any] = {
        "federation": "a",
        "bundle": "brain_lesion_mri",
        "strategy": find_strategy("ditto").strategy,
    }
    with pytest.raises(PFedSAMError, match=code):
        Plan(**{**told, **plan}).checked()


def test_a_job_of_a_bundle_that_only_its_sites_have_can_be_exported(job: Path) -> None:
    told = {**json.loads(config_of(job, PLAN_FILE).read_text()), "bundle": "theirs"}
    config_of(job, PLAN_FILE).write_text(json.dumps(told))
    assert plan_settings(export_job(job, job.parent / "out"))["bundle"] == "theirs"
    with pytest.raises(PFedSAMError, match="E18"):
        export_job(job, job.parent / "other", plan={"overrides": {"batch_size": 0}})


def test_a_plan_without_a_federation_is_refused_whoever_has_the_bundle(job: Path) -> None:
    plan = json.loads(config_of(job, PLAN_FILE).read_text())
    del plan["federation"]
    config_of(job, PLAN_FILE).write_text(json.dumps({**plan, "bundle": "theirs"}))
    with pytest.raises(PFedSAMError, match=r"E29.*federation"):
        export_job(job, job.parent / "out")


@pytest.mark.parametrize(
    ("how", "code"),
    [({"rounds": 10_001}, "E16"), ({"min_clients": 0}, "E16"), ({"overrides": {"batchsize": 4}}, "E18")],
    ids=str,
)
def test_a_recipe_refuses_when_it_is_made(how: dict[str, Any], code: str) -> None:
    with pytest.raises(PFedSAMError, match=code):
        PFedSAMRecipe("fedavg_lora", **how)


@pytest.mark.parametrize("rule", RULES)
def test_a_kit_of_the_server_allows_the_aggregator_of_every_rule(rule: str, tmp_path: Path) -> None:
    strategy = {**plan_settings(SOURCE)["strategy"], "aggregation": rule}
    job = export_job(SOURCE, tmp_path / rule, plan={"strategy": strategy})
    allowed = {*needed_classes(SERVER), *DEFAULT_CLASS_ALLOW_LIST}
    (aggregator,) = [one for one in server_settings(job)["components"] if one["id"] == "aggregator"]
    assert aggregator["path"] in allowed


def of_before(job: Path) -> Path:
    """The job as it was before there were other rules: plain mean, nothing promised, the plan on both sides."""
    plan = json.loads(config_of(job, PLAN_FILE).read_text())
    config_of(job, PLAN_FILE).unlink()
    for side in (SERVER, CLIENT):
        config = json.loads(config_of(job, side).read_text())
        next(one for one in config["components"] if one["id"] == "plan")["args"] = plan
        config_of(job, side).write_text(json.dumps(config))
    path = config_of(job)
    config = json.loads(path.read_text())
    config["components"] = [one for one in config["components"] if one["id"] != "least_sites"]
    for one in config["components"]:
        if one["id"] == "aggregator":
            one["path"] = MEAN
            one["args"] = {"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": True}
    path.write_text(json.dumps(config))
    return job


def test_a_job_of_before_keeps_its_rule_and_keeps_what_it_promises_now(job: Path, tmp_path: Path) -> None:
    out = export_job(of_before(job), tmp_path / "out", server={"min_clients": 5})
    components = {one["id"]: one["path"] for one in server_settings(out)["components"]}
    assert components["aggregator"] == MEAN and components["least_sites"].endswith(".LeastSites")
    told = plan_settings(out)
    assert (told["strategy"]["aggregation"], told["least_sites"]) == ("mean", 3)
    for side in (SERVER, CLIENT):
        (plan,) = [one for one in json.loads(config_of(out, side).read_text())["components"] if one["id"] == "plan"]
        assert "args" not in plan, "the plan stands once"
    assert Simulation(tmp_path, tmp_path, str(job)).plan["strategy"]["aggregation"] == "mean", "also in a simulation"


@pytest.mark.parametrize(("rule", "refused"), [("svd", True), ("krum", True), ("mean", False), ("norm_clipped", False)])
def test_encryption_looks_at_the_rule_that_the_job_will_have(rule: str, refused: bool, tmp_path: Path) -> None:
    strategy = {**plan_settings(SOURCE)["strategy"], "aggregation": rule}
    how = {"plan": {"strategy": strategy}, "privacy": Privacy(encrypt=True)}
    if refused:
        with pytest.raises(PFedSAMError, match=rf"E32.*'{rule}'"):
            export_job(SOURCE, tmp_path / "out", **how)
        return
    job = export_job(SOURCE, tmp_path / "out", **how)
    assert any("HEInTime" in one["path"] for one in server_settings(job)["components"])


def test_what_was_agreed_on_decides_a_run(tmp_path: Path) -> None:
    jobs = [export_job(SOURCE, tmp_path / str(most), plan={"most_cases": most}) for most in (5, 50)]
    assert job_terms(jobs[0]) != job_terms(jobs[1])
    assert job_terms(export_job(SOURCE, tmp_path / "x", plan={"least_sites": 2})) == job_terms(SOURCE)


def test_the_command_writes_rule_agreement_and_promise(tmp_path: Path) -> None:
    def export(*words: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["job", "export", "pfedsam", str(tmp_path / "out"), *words])
        assert done.exit_code == 0, done.output
        return plan_settings(tmp_path / "out")

    assert export("--min-clients", "2")["least_sites"] == 2
    told = export("--aggregation", "median", "--most-cases", "a=40", "--most-cases", "b=9", "--least-sites", "5")
    assert (told["strategy"]["aggregation"], told["most_cases"], told["least_sites"]) == (
        "median",
        {"a": 40, "b": 9},
        5,
    )
    assert export("--most-cases", "40")["most_cases"] == 40
    for wrong in (["a"], ["a=b"], ["a=1", "2"], ["1", "2"], ["-1"]):
        words = [word for one in wrong for word in ("--most-cases", one)]
        assert CliRunner().invoke(app, ["job", "export", "pfedsam", str(tmp_path / "out"), *words]).exit_code == 2
