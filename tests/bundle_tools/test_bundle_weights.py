"""`models/model.pt` of a bundle: who is in it, and the model that a bundle's inference takes."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor
from typer.testing import CliRunner

from pfedsam.bundle_tools.new import new_bundle
from pfedsam.bundle_tools.tiny import tiny_site
from pfedsam.bundle_tools.weights import make_weights
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, group_of, manifest, personal_state, shared_state
from pfedsam.storage.bundle_weights import WEIGHTS
from pfedsam.storage.global_model import write_global_model
from pfedsam.storage.site_model import SiteModel, write

NAME, ROLES = "kidney_mri", Roles()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a user's own with a small network."""
    root = new_bundle(NAME, ["kidney"], "mri", tmp_path_factory.mktemp("made"))
    path = root / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backbone": "vit_test", "image_size": 64}))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / NAME)


def trained(classes: int = 1, size: int = 64) -> SegmentAnything:
    """A network whose shared and personal tensors were moved."""
    settings = {"adapted_blocks": "auto", "lora_rank": 16, "lora_places": ["qv", "projection", "mlp"]}
    network = build_network("vit_test", image_size=size, classes=classes, **settings)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ROLES.of(name) != "frozen":
                parameter.add_(0.05)
    return network


@pytest.fixture
def site_model(tmp_path: Path) -> Path:
    write(tmp_path / "state.safetensors", SiteModel.of(trained(), ROLES, bundle=NAME, round=3))
    return tmp_path / "state.safetensors"


def run_command(root: Path, *words: str) -> dict[str, Tensor]:
    done = CliRunner().invoke(app, ["bundle-weights", str(root), *words])
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE((root / WEIGHTS).stat().st_mode) == 0o600
    return torch.load(root / WEIGHTS, weights_only=True)


def test_a_sites_model_gives_its_shared_part_and_nothing_of_its_own(root: Path, site_model: Path) -> None:
    start, weights = run_command(root), run_command(root, "--model", str(site_model))
    assert start.keys() == weights.keys()
    for name, tensor in shared_state(trained(), ROLES).items():
        assert torch.equal(weights[name], tensor) and not torch.equal(weights[name], start[name])
    own = personal_state(trained(), ROLES)
    assert own and all(torch.equal(weights[name], start[name]) for name in own), "experts are as they start"
    assert not [name for name, tensor in own.items() if torch.equal(weights[name], tensor)]


def test_a_global_model_that_holds_what_may_never_be_shared_is_refused(root: Path, tmp_path: Path) -> None:
    network = trained()
    assert network.base_fingerprint
    state = {**shared_state(network, ROLES), **personal_state(network, ROLES)}
    expected = {**manifest(network, ROLES, "shared"), **manifest(network, ROLES, "personal")}
    write_global_model(tmp_path / "global.safetensors", state, network.base_fingerprint, expected, 3)
    with pytest.raises(PFedSAMError, match="E12"):
        make_weights(root, tmp_path / "global.safetensors")
    assert not (root / WEIGHTS).exists()


def test_a_global_model_gives_the_same(root: Path, site_model: Path, tmp_path: Path) -> None:
    network = trained()
    assert network.base_fingerprint
    state, expected = shared_state(network, ROLES), manifest(network, ROLES, "shared")
    write_global_model(tmp_path / "global.safetensors", state, network.base_fingerprint, expected, 3)
    of_global = run_command(root, "--model", str(tmp_path / "global.safetensors"))
    of_site = run_command(root, "--model", str(site_model))
    assert all(torch.equal(tensor, of_site[name]) for name, tensor in of_global.items())


@pytest.mark.parametrize(
    ("network", "told", "code"),
    [(trained(), "lungs", "E32"), (trained(size=96), NAME, "E11"), (trained(classes=2), NAME, "E11")],
    ids=["another bundle", "other settings", "other classes"],
)
def test_a_model_that_is_not_the_bundles_is_refused_and_nothing_is_written(
    network: SegmentAnything, told: str, code: str, root: Path, tmp_path: Path
) -> None:
    write(tmp_path / "other.safetensors", SiteModel.of(network, ROLES, bundle=told, round=3))
    done = CliRunner().invoke(app, ["bundle-weights", str(root), "--model", str(tmp_path / "other.safetensors")])
    assert done.exit_code != 0 and not (root / WEIGHTS).exists()
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == code


# ---- the inference ------------------------------------------------------------------------------------------------


def network_of_inference(root: Path, out: Path, **settings: object) -> SegmentAnything:
    """The network of a bundle's inference when it is ready to run."""
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "inference.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        output_dir=str(out),
        datalist=[],
        **settings,
    )
    workflow.initialize()
    network: SegmentAnything = workflow.parser.get_parsed_content("network")
    return network


def moved(network: SegmentAnything) -> set[str]:
    """Groups that are as after a training."""
    after = trained().state_dict()
    groups = {group_of(name) for name in after if ROLES.of(name) != "frozen"}
    state = network.state_dict()
    return {
        group
        for group in groups
        if all(torch.equal(after[name], state[name]) for name in after if group_of(name) == group)
    }


def test_an_inference_of_a_fresh_bundle_writes_a_label_and_says_that_nothing_was_trained(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site, out = tiny_site(tmp_path / "site", 1, rgb=False, cases=3), tmp_path / "out"
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "inference.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=str(site),
        output_dir=str(out),
    )
    workflow.initialize()
    assert workflow.check_properties() in (None, [])
    workflow.run()
    assert len([path for path in out.rglob("*") if path.is_file()]) == 3
    assert "UNTRAINED" in caplog.text and "bundle-weights" in caplog.text


def test_an_inference_takes_what_its_training_wrote_then_the_weights_of_the_bundle(
    root: Path, site_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run_command(root, "--model", str(site_model))
    assert moved(network_of_inference(root, out)) == {"lora_a", "lora_b", "decoder_subset"}
    out.mkdir()
    shutil.copy(site_model, out / "model.safetensors")
    assert moved(network_of_inference(root, out)) == {"lora_a", "lora_b", "decoder_subset", "experts"}
    assert "UNTRAINED" not in caplog.text


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt"])
def test_a_named_model_that_is_not_there_is_never_replaced_by_another(name: str, root: Path, tmp_path: Path) -> None:
    run_command(root)
    with pytest.raises(RuntimeError) as error:
        network_of_inference(root, tmp_path / "out", model_file=str(tmp_path / name))
    assert "E13" in str(error.value.__cause__)


def test_weights_of_another_network_are_refused(root: Path, tmp_path: Path) -> None:
    torch.save(trained(classes=2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(RuntimeError) as error:
        network_of_inference(root, tmp_path / "out", model_file=str(tmp_path / "other.pt"))
    assert "E10" in str(error.value.__cause__)
