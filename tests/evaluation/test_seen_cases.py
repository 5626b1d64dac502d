"""Cases that a model has seen: left out of its test, of a later job's validation, or refused. Everything real, tiny."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from typer.testing import CliRunner

from pfedsam.bundles import find_bundle
from pfedsam.cli import app
from pfedsam.data.phantom import write_phantom
from pfedsam.data.sites import read_split
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.site import evaluate_site
from pfedsam.inference.export import export_model
from pfedsam.parameters import shared_state
from pfedsam.storage.site_model import read, write
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.federation import Federation, pooled_site, run_federation
from pfedsam.training.site import SiteTrainer

torch.set_num_threads(1)
BUNDLE = "brain_lesion_mri"
TINY = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 1,
    "negatives_per_case": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen") / "data"
    write_phantom(folder, sites=2, cases=6, shape=(32, 32, 6))
    return folder


def local(data: Path, out: Path, seed: int = 0) -> SiteTrainer:
    strategy = find_strategy("fedrep").checked()
    training = SiteTrainer(BUNDLE, data / "site-1", strategy, {**TINY, "seed": seed}, out)
    training.open()
    training.receive(shared_state(training.network, strategy.roles), training.fingerprint)
    return training


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one round with seed 0."""
    folder = tmp_path_factory.mktemp("model")
    training = local(data, folder)
    training.train(0)
    write(folder / "model.safetensors", training.model(round=0, final=True))
    return folder / "model.safetensors"


def evaluated(data: Path, model: Path, out: Path, seed: int, **how):
    return evaluate_site(BUNDLE, data / "site-1", model, overrides={**TINY, "seed": seed}, output_dir=out, **how)


def names(data: Path, section: str, seed: int) -> set[str]:
    return {case.name for case in read_split(data / "site-1", seed)[section]}


def test_cases_of_another_split_that_were_seen_are_named_and_left_out_of_all_numbers(data, model, tmp_path):
    used = {section: names(data, section, 0) & names(data, "test", 1) for section in ("training", "validation")}
    fresh = names(data, "test", 1) - used["training"] - used["validation"]
    assert used["training"] and not fresh, "two of two were trained on"
    with pytest.raises(PFedSAMError, match=r"E08: 2 test case\(s\).*trained or validated on: s1-case"):
        evaluated(data, model, tmp_path, 1)
    # a split in which one of three test cases is new to the model
    one = sorted(names(data, "test", 0))[0]
    site = tmp_path / "data" / "site-1"
    site.mkdir(parents=True)
    for kind in ("images", "labels"):
        (site / kind).symlink_to(data / "site-1" / kind)
    old, val = sorted(names(data, "training", 0)), sorted(names(data, "validation", 0))
    listed = {"training": old[1:2], "validation": old[2:], "test": [one, old[0], val[0]]}
    (site / "datalist.json").write_text(json.dumps(listed))
    found = evaluated(tmp_path / "data", model, tmp_path / "out", 0)
    assert found.excluded == {old[0]: "training", val[0]: "validation"}
    assert {score.case for score in found.scores} == {one} and {case.case for case in found.examples.values()} == {one}
    assert found.mean("personal") == found.dice_of(one, "personal")
    assert [note for note in found.notes if old[0] in note and "trained on" in note]
    assert [note for note in found.notes if val[0] in note and "used for validation" in note]
    with pytest.raises(PFedSAMError, match="E08"):
        evaluated(tmp_path / "data", model, tmp_path / "out", 0, refuse_seen=True)
    words = ["evaluate", str(site), str(model), "--out", str(tmp_path / "shown")]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0 and "1 of 3" in done.output and f"trained on: {old[0]}" in done.output
    results = json.loads((tmp_path / "shown" / "results.json").read_text())["sites"]["site-1"]
    assert (results["cases"], results["excluded"]) == (1, 2)


def test_its_own_test_cases_are_all_tested_and_nothing_is_said(data, model, tmp_path):
    found = evaluated(data, model, tmp_path, 0, refuse_seen=True)
    assert {score.case for score in found.scores} == names(data, "test", 0)
    assert not found.excluded and not found.notes


@pytest.mark.parametrize("section", ["training", "validation"])
def test_another_section_that_is_asked_for_is_evaluated_with_a_sentence(data, model, tmp_path, section):
    found = evaluated(data, model, tmp_path, 0, section=section)
    assert {score.case for score in found.scores} == names(data, section, 0) and not found.excluded
    assert len(found.notes) == 1 and "no test of the model" in found.notes[0]


def test_a_model_that_does_not_say_what_it_has_seen_is_named(data, model, tmp_path):
    old = read(model)
    del old.info["seen"]
    write(tmp_path / "old.safetensors", old)
    found = evaluated(data, tmp_path / "old.safetensors", tmp_path, 1)
    assert found.notes == ["the model does not say which patients it was trained on"]
    assert {score.case for score in found.scores} == names(data, "test", 1)
    later = local(data, tmp_path)
    later.restore(old)
    assert later.model().info["seen"]["whole"] is False


def test_a_later_job_with_another_split_does_not_validate_on_what_was_trained_on(data, model, tmp_path, caplog):
    """The split of the later job has two validation cases, one of which the first job has trained on."""
    site = tmp_path / "data" / "site-1"
    site.mkdir(parents=True)
    for kind in ("images", "labels"):
        (site / kind).symlink_to(data / "site-1" / kind)
    trained, fresh = sorted(names(data, "training", 0)), sorted(names(data, "test", 0))
    listed = {"training": trained[1:], "validation": [trained[0], fresh[0]], "test": fresh[1:]}
    (site / "datalist.json").write_text(json.dumps(listed))
    later = local(tmp_path / "data", tmp_path / "out")
    later.validate(experts=False)
    with caplog.at_level(logging.WARNING):
        later.restore(read(model))
    assert trained[0] in caplog.text and "1 case(s)" in caplog.text and fresh[0] not in caplog.text
    assert [item["case"] for item in later.validation_cases] == [fresh[0]]
    validated: list[str] = []
    with later.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: validated.extend(one["case"] for one in engine.state.batch)
    ):
        later.validate(experts=False)
    assert validated == [fresh[0]], "the Dice that was known before is not told again"
    before = read(model).info["seen"]
    later.train(1)
    after = later.model().info["seen"]
    assert after["salt"] == before["salt"] and set(after["training"]) == set(before["training"])
    assert len(set(after["validation"]) - set(before["validation"])) == 1

    listed |= {"training": trained[1:], "validation": trained[:1]}
    (site / "datalist.json").write_text(json.dumps(listed))
    refusing = local(tmp_path / "data", tmp_path / "out")
    with pytest.raises(PFedSAMError, match=r"E08: all 1 validation cases"):
        refusing.restore(read(model))


def test_before_its_training_a_model_says_that_it_has_seen_none(data, tmp_path):
    training = local(data, tmp_path)
    assert training.model().info["seen"]["training"] == []
    training.finish(0)
    assert len(training.model().info["seen"]["training"]) == len(names(data, "training", 0))


def test_an_exported_model_still_knows(data, model, tmp_path):
    export_model(model, tmp_path / "exported.safetensors")
    assert read(tmp_path / "exported.safetensors").info["seen"] == read(model).info["seen"]


def test_a_bundle_that_trains_alone_tells_what_it_has_seen(data, tmp_path):
    from monai.bundle import ConfigWorkflow

    root = find_bundle(BUNDLE)
    told = {"dataset_dir": str(data / "site-1"), "output_dir": str(tmp_path), "max_epochs": 1}
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "train.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(root),
        **told,
        **TINY,
    )
    workflow.initialize()
    workflow.run()
    with pytest.raises(PFedSAMError, match="E08"):
        evaluated(data, tmp_path / "model.safetensors", tmp_path, 1)
    assert not evaluated(data, tmp_path / "model.safetensors", tmp_path, 0).excluded


def test_a_pooled_model_knows_the_patients_of_each_site(data, tmp_path):
    pooled = pooled_site({name: data / name for name in ("site-1", "site-2")}, tmp_path / "pooled", 0, 3)
    strategy = find_strategy("centralised").checked()
    one = Federation(BUNDLE, {"pooled": pooled}, strategy, tmp_path / "run", 1, TINY)
    run_federation(one, aggregated=False)
    file = one.model_of("pooled")
    for name in ("site-1", "site-2"):
        how = {"overrides": TINY, "models": ("personal",), "output_dir": tmp_path, "site": name}
        assert not evaluate_site(BUNDLE, data / name, file, **how).excluded
        with pytest.raises(PFedSAMError, match="E08"):
            evaluate_site(BUNDLE, data / name, file, **{**how, "overrides": {**TINY, "seed": 1}})
