"""The checked-in job in NVFlare's simulator: its shapes, going on after a stop, and sites in trouble."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.fuel.utils import fobs
from safetensors.torch import load_file
from scenarios import LOCKED_CLASSES, TROUBLES
from simulated import BUNDLE, FEDERATION, SOURCE, Job, Run

from pfedsam.deployment.allowed_classes import classes_of
from pfedsam.federated.boundary import FINGERPRINT_KEY, ROUND_KEY, check_result
from pfedsam.federated.plan import Plan
from pfedsam.storage.site_model import read

SITES = ("site-1", "site-2")


# ---- shapes -------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_global_model_and_a_pair_at_each_site(clean_run: Run) -> None:
    assert clean_run.exit_code == 0
    assert clean_run.global_model.is_file()
    for site in SITES:
        folder = clean_run.state_folder(site)
        info = read(folder / "state.safetensors").info
        assert (info["round"], info["final"]) == (1, True)
        assert 0 <= info["val_dice_global"] <= 1
        assert 0 <= info["val_dice_personal"] <= 1
        assert read(folder / "previous.safetensors").info["round"] == 0
    assert "2 of 2 sites done" in clean_run.server_log()


def test_whatever_is_called_safetensors_is_one(clean_run: Run) -> None:
    """NVFlare's own files of the evaluation across sites are in a format of its own."""
    server = clean_run.workspace / "server"
    named = [path for path in server.rglob("*") if path.is_file() and ".safetensors" in path.name]
    assert "global_model.safetensors" in {path.name for path in named}
    assert all(load_file(path) for path in named)
    assert [path for path in server.rglob("SRV_*") if path.is_file()], "nothing was evaluated"


def test_a_run_writes_nothing_into_the_home_folder(clean_run: Run) -> None:
    assert [path for path in clean_run.home.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_one_thread_for_two_sites_builds_each_learner_anew_and_goes_on(one_thread_run: Run) -> None:
    assert one_thread_run.exit_code == 0
    assert one_thread_run.global_model.is_file()
    for site in SITES:
        log = one_thread_run.site_log(site)
        assert log.count("Got learner: PFedSAMLearner") >= 2, "one process did both tasks"
        assert "personal state of round 0 taken" in log
        folder = one_thread_run.state_folder(site)
        before, after = read(folder / "previous.safetensors"), read(folder / "state.safetensors")
        assert (before.info["round"], after.info["round"]) == (0, 1)
        assert (before.info["final"], after.info["final"]) == (False, True)
        assert before.moments
        # the final phase keeps no moments of its own: these came back from the disk
        assert before.moments.keys() == after.moments.keys()
        assert all(torch.equal(value, after.moments[name]) for name, value in before.moments.items())


def test_the_locked_form_runs_where_the_classes_are_listed(locked_run: Run) -> None:
    assert not list((locked_run.folder / "job").rglob("custom"))
    assert locked_run.exit_code == 0
    assert "ComponentNotAuthorized" not in locked_run.output
    assert locked_run.global_model.is_file()
    assert all(read(locked_run.state_folder(site) / "state.safetensors").info["final"] for site in SITES)


def test_the_locked_form_is_refused_elsewhere(refused_run: Run) -> None:
    assert refused_run.exit_code == 2
    assert "ComponentNotAuthorized" in refused_run.output
    assert not refused_run.global_model.exists()
    assert not any(refused_run.state_root.iterdir())


def test_the_listed_classes_are_exact_and_few() -> None:
    """A prefix would also admit every callable that our modules import; a new class in the job must be listed here."""
    assert tuple(classes_of(SOURCE)) == LOCKED_CLASSES
    assert all(name.rpartition(".")[2][0].isupper() for name in LOCKED_CLASSES)


# ---- what is sent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_a_site_sends_four_bytes_for_each_shared_parameter(clean_run: Run, site: str) -> None:
    state = read(clean_run.state_folder(site) / "state.safetensors")
    parameters = sum(tensor.numel() for tensor in state.shared.values())
    (sent,) = (one for one in clean_run.sent(site) if one["task"] == "train")
    assert (sent["bytes"], sent["tensors"]) == (4 * parameters, len(state.shared))
    assert sent["excluded"] == len(state.personal)
    (received,) = (one for one in clean_run.received() if (one["client"], one["task"]) == (site, "train"))
    assert (received["bytes"], received["sha256"]) == (sent["bytes"], sent["sha256"])
    (result,) = clean_run.results(site)
    assert sum(value.nbytes for _, value in result.leaves if isinstance(value, np.ndarray)) == sent["bytes"]
    # the message has about 400 bytes for each name and shape beside them, whatever the size of the network
    assert result.size - sent["bytes"] < 2000 + 400 * sent["tensors"]


def test_a_message_of_the_main_job_is_at_most_three_percent_larger_than_its_tensors() -> None:
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.app_common.decomposers import common_decomposers

    common_decomposers.register()
    plan = Plan(FEDERATION, BUNDLE, Job().plan["strategy"])
    shared = plan.shared()
    data = {name: np.zeros(spec.shape, spec.dtype) for name, spec in shared.items()}
    meta = {ROUND_KEY: 0, MetaKey.NUM_STEPS_CURRENT_ROUND: 12, FINGERPRINT_KEY: "ab" * 32}
    result = DXO(DataKind.WEIGHT_DIFF, data, meta).to_shareable()
    passed = check_result(result, "train", shared=shared, code="E19")
    tensors = sum(spec.bytes for spec in shared.values())
    assert tensors == 4 * sum(int(np.prod(spec.shape)) for spec in shared.values())
    assert tensors < len(fobs.dumps(passed.shareable)) <= 1.03 * tensors


# ---- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_a_second_run_goes_on_from_the_sites_personal_state(clean_run: Run, resumed_run: Run, site: str) -> None:
    assert resumed_run.exit_code == 0
    assert "personal state of round 1 taken" in resumed_run.site_log(site)
    before = read(clean_run.state_folder(site) / "state.safetensors")
    after = read(resumed_run.state_folder(site) / "state.safetensors")
    assert after.info["round"] == 2
    assert all(not torch.equal(tensor, after.personal[name]) for name, tensor in before.personal.items())
    step = next(name for name in after.moments if name.endswith("#step"))
    assert after.moments[step] > before.moments[step], "the optimiser's moments began anew"


def test_a_second_run_starts_with_the_next_round(clean_run: Run, resumed_run: Run) -> None:
    log = resumed_run.server_log()
    assert "Round 1 started" in log
    assert "Round 0 started" not in log
    assert resumed_run.global_model.read_bytes() != clean_run.global_model.read_bytes()


# ---- sites in trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", TROUBLES, ids=[code for _, code in TROUBLES.values()])
def test_a_site_in_trouble_answers_with_its_code(troubled_run: Run, site: str) -> None:
    what, code = TROUBLES[site]
    (result,) = troubled_run.results(site)
    assert result.return_code == f"SITE_REFUSED:{code}", what
    assert f"{code}: " in troubled_run.site_log(site)
    assert f"error code: SITE_REFUSED:{code}" in troubled_run.server_log()


def test_a_run_without_a_good_site_has_no_global_model(troubled_run: Run) -> None:
    assert troubled_run.exit_code != 0
    assert not troubled_run.global_model.exists()


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("site-1", "labels/s1-case-01.nii.gz"),
        ("site-2", "images/s1-case-01.nii.gz"),
        ("site-3", "another job works on"),
        ("site-4", "plan.json, strategy.phases.0.name: '{$TEST_SECRET}'"),
        ("site-5", "'phases.0.learnin_rate' = 0.1"),
        ("site-6", "the federation has base weights"),
        ("site-7", "Lower the learning rate"),
    ],
)
def test_the_sites_own_log_says_what_is_wrong(troubled_run: Run, site: str, words: str) -> None:
    lines = [line for line in troubled_run.site_log(site).splitlines() if f"{TROUBLES[site][1]}: " in line]
    assert lines
    assert all(words in line for line in lines)


@pytest.mark.parametrize("site", ["site-3", "site-7"], ids=["second job", "loss is not finite"])
def test_the_state_of_the_last_good_round_is_intact(clean_run: Run, troubled_run: Run, site: str) -> None:
    good, now = clean_run.state_folder("site-1"), troubled_run.state_folder(site)
    assert now.name == good.name
    for name in ("state.safetensors", "previous.safetensors"):
        assert (now / name).read_bytes() == (good / name).read_bytes()


@pytest.mark.parametrize("site", [site for site in TROUBLES if site != "site-7"])
def test_a_refused_site_has_not_trained(troubled_run: Run, site: str) -> None:
    assert "mean loss" not in troubled_run.site_log(site)


def test_every_site_keeps_its_sentences_in_its_own_folder(troubled_run: Run) -> None:
    for record in Path(troubled_run.workspace / "server").rglob("*.jsonl"):
        for line in record.read_text().splitlines():
            assert set(json.loads(line)) <= {
                "time", "client", "task", "round", "bytes", "accepted", "reply", "sha256", "code"
            }  # fmt: skip
