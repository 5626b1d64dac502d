"""The commands about base weights and networks, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedsam import defaults
from pfedsam.bundles import OVERRIDES, checked_overrides, network_of
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.networks.weights import CHECKPOINTS
from pfedsam.parameters import Roles, manifest
from pfedsam.storage.global_model import read_global_model
from pfedsam.training.catalogue import find_strategy

TINY = ("--set", "backbone=vit_test", "--set", "image_size=64")
#: Settings of the network in the default job with these.
OF_DEFAULT = {"backbone": "vit_test", "image_size": 64, **find_strategy(defaults.STRATEGY).overrides}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("PFEDSAM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("PFEDSAM_CHECKPOINT", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def told(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_models_are_listed_with_size_licence_and_place():
    listed = told("models")
    for name, checkpoint in CHECKPOINTS.items():
        assert name in listed and checkpoint.licence in listed
    assert "weights" in listed and "375 MB" in listed


def described(*arguments: str) -> dict:
    return json.loads(told("describe", "brain_lesion_mri", "--json", *arguments))


def test_description_counts_what_the_network_has():
    found = described(*TINY)
    network = network_of("brain_lesion_mri", OF_DEFAULT)
    counts = {group["group"]: group["parameters"] for group in found["groups"]}
    shared = manifest(network, Roles(), "shared")
    # the site's own copy of what is shared is beside the network
    assert counts.pop("personal_copy") == sum(network.state_dict()[name].numel() for name in shared)
    assert sum(counts.values()) == sum(t.numel() for t in network.state_dict().values())
    assert found["payload_bytes"] == sum(spec.bytes for spec in shared.values())
    assert found["trunk_gflop"] > 0 and found["head_gflop"] > 0


def test_flops_move_from_the_cache_to_the_head_with_more_adapted_blocks():
    few, all_ = described(*TINY, "--set", "adapted_blocks=1"), described(*TINY, "--set", "adapted_blocks=all")
    assert few["trunk_gflop"] > all_["trunk_gflop"] and few["head_gflop"] < all_["head_gflop"]


@pytest.mark.parametrize(
    ("shared", "rank", "share"),
    [
        (["lora_a", "lora_b", "decoder_subset"], 0, "subset"),
        (["lora_a", "lora_b", "decoder_subset", "decoder_rest"], 0, "full"),
        (["lora_a", "lora_b"], 2, "lora"),
        (["lora_a", "lora_b"], 0, "frozen"),
        (["lora_a", "lora_b", "decoder_subset"], 2, "subset + lora"),
    ],
)
def test_every_share_of_the_decoder_is_a_setting_and_is_told(shared, rank, share):
    from pfedsam.bundle_tools.describe import describe

    settings = {"backbone": "vit_test", "image_size": 64, "decoder_rank": rank}
    found = describe("brain_lesion_mri", Roles(shared=tuple(shared)), settings)
    assert found.decoder_share == share
    sizes = {size.group: size.role for size in found.groups}
    assert {group for group, role in sizes.items() if role == "shared"} == set(shared)


@pytest.mark.parametrize("name", ["fedln", "ditto", "fedavg_lora_ft", "pfedsam"])
def test_sizes_of_the_roles_are_those_of_the_strategys_tensors(name):
    from pfedsam.bundle_tools.describe import describe

    file = find_strategy(name)
    strategy, settings = file.checked(), {"backbone": "vit_test", "image_size": 64, **file.overrides}
    found = describe("brain_lesion_mri", strategy.roles, settings, copies=strategy.has_copy)
    network = network_of("brain_lesion_mri", settings, weights=False)
    sizes = {role: manifest(network, strategy.roles, role) for role in ("shared", "personal", "frozen")}
    numbers = {role: sum(spec.bytes for spec in one.values()) for role, one in sizes.items()}
    assert found.payload == numbers["shared"]
    copy = {size.group: size for size in found.groups}.get("personal_copy")
    assert (copy.bytes if copy else 0) == (numbers["shared"] if strategy.has_copy else 0)
    told = sum(size.bytes for size in found.groups if size.role == "personal" and size.group != "personal_copy")
    assert told == numbers["personal"]
    assert ("layer_norm" in {size.group for size in found.groups}) == (name == "fedln")


def test_description_is_whole_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = told("describe", "brain_lesion_mri", "--job", "pfedsam", *TINY)
    for word in ("decoder_subset", "on the wire", "expert_places", "global, weight 0.1"):
        assert word in shown


def test_first_global_model_is_what_a_server_builds_itself(tmp_path):
    out = tmp_path / "theta0.safetensors"
    told("init-global", str(out), *TINY)
    network = network_of("brain_lesion_mri", OF_DEFAULT)
    state, fingerprint = read_global_model(out, manifest(network, Roles(), "shared"))
    assert fingerprint == network.base_fingerprint
    for name, tensor in state.items():
        assert tensor.equal(network.state_dict()[name])


def test_a_first_global_model_replaces_a_file_by_force_only(tmp_path):
    out = tmp_path / "theta0.safetensors"
    out.write_text("mine")
    done = CliRunner().invoke(app, ["init-global", str(out), *TINY])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24" and out.read_text() == "mine"
    told("init-global", str(out), *TINY, "--force")
    assert out.read_bytes() != b"mine"


def test_weights_that_are_missing_are_an_error_that_says_where_to_get_them(tmp_path):
    done = CliRunner().invoke(app, ["init-global", str(tmp_path / "a"), "--set", "backbone=vit_b"])
    assert isinstance(done.exception, PFedSAMError) and "pfedsam models download sam_vit_b" in str(done.exception)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_places", ["encoder", "$import os"]),
        ("expert_places", ["../a"]),
        ("expert_places", [1]),
        ("expert_places", "encoder"),
        ("checkpoint", "/etc/passwd"),
        ("checkpoint", "weights"),
        ("checkpoint", "@x"),
    ],
)
def test_lists_and_checkpoints_of_a_job_are_plain_names(key, value):
    assert key in OVERRIDES
    with pytest.raises(PFedSAMError, match="E18"):
        checked_overrides({key: value})


def test_own_weights_are_named_by_the_machine_and_not_by_the_job(monkeypatch, tmp_path):
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", str(tmp_path / "own.pth"))
    with pytest.raises(PFedSAMError, match=r"E10.*own\.pth"):
        network_of("brain_lesion_mri", {"image_size": 32})
    assert checked_overrides({"checkpoint": "medsam_vit_b"}) == {"checkpoint": "medsam_vit_b"}


def test_tables_of_a_run_are_whole_in_80_columns():
    from rich.console import Console

    from pfedsam.evaluation.tables import site_table

    names = ["case_western_st_joseph", "thomas_jefferson"]
    site = {"cases": 24, "failures_global": 10, "failures_personal": 2, "bytes_per_round": 897_024}
    dice = {"dice_global": 0.5912, "dice_personal": 0.6123}
    summary = {f"{kind}_{model}": 0.5912 for kind in ("mean", "worst") for model in ("global", "personal")}
    found = {"sites": {name: {**site, **dice} for name in names}, **summary}
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(site_table(found, "title"))
    text = console.export_text()
    for word in (*names, "0.591 *", "0.612", "+0.021", "10, 2", "0.90", "mean of sites"):
        assert word in text
