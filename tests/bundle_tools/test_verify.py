"""Every bundle passes every check, and every check goes red on a broken bundle."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pfedsam.bundle_tools.new import new_bundle
from pfedsam.bundle_tools.verify import CHECKS, Bundle, tiny_site, verify_bundle
from pfedsam.bundle_tools.weights import make_weights
from pfedsam.bundles import BUNDLES_VARIABLE, folder, installed_bundles
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.inference.predict import Predictor
from pfedsam.parameters import shared_state
from pfedsam.storage.bundle_weights import WEIGHTS
from pfedsam.storage.site_model import read, write
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer

#: The fields that MONAI's metadata schema requires; a copy of the published file is not kept here.
REQUIRED = (
    *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "description"),
    *("required_packages_version", "authors", "copyright", "network_data_format"),
)
SHIPPED = sorted(path.parent.parent for path in folder("bundles").glob("*/configs/metadata.json"))


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "schema.json"
    tensor = {"required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"]}
    form = {"properties": {side: {"additionalProperties": tensor} for side in ("inputs", "outputs")}}
    fields = {"network_data_format": {**form, "required": ["inputs", "outputs"]}, "authors": {"type": "string"}}
    path.write_text(json.dumps({"type": "object", "required": list(REQUIRED), "properties": fields}))
    return path


def test_there_are_three_bundles() -> None:
    assert [path.name for path in SHIPPED] == ["brain_lesion_mri", "fundus_disc_cup", "prostate_mri"]


@pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_bundle_passes_every_check_from_any_directory(
    root: Path, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(root, tmp_path / root.name)
    make_weights(copy)
    found = list(verify_bundle(Bundle(copy, schema)))
    assert [check.name for check in found] == list(CHECKS)
    assert [check for check in found if not check.passed] == []


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the user's, small enough to be broken many times."""
    return with_a_file_of_weights(new_bundle("kidney_mri", ["kidney", "tumour"], "mri", tmp_path_factory.mktemp("own")))


def with_a_file_of_weights(root: Path) -> Path:
    """For checks that look at names of files only."""
    (root / WEIGHTS).parent.mkdir()
    (root / WEIGHTS).touch()
    return root


def edit(root: Path, name: str, change: Callable[[Any], None]) -> None:
    path = root / "configs" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BREAKS: dict[str, Callable[[Path], None]] = {
    "files": lambda root: (root / "LICENSE").unlink(),
    "metadata": lambda root: edit(root, "metadata.json", lambda c: c.update(version="9.9.9")),
    "settings": lambda root: edit(root, "train.json", lambda c: c.update(top_k=9)),
    "left and right": lambda root: edit(
        root, "train.json", lambda c: c.update(class_names=["left_kidney", "right_kidney"])
    ),
    "network in and out": lambda root: edit(
        root, "metadata.json", lambda c: c["network_data_format"]["outputs"]["pred"].update(num_channels=3)
    ),
    "properties of train": lambda root: edit(root, "train.json", lambda c: c["train"].pop("inferer")),
    "properties of train and evaluate": lambda root: edit(
        root, "evaluate.json", lambda c: c.update({"train#trainer": None})
    ),
    "properties of inference": lambda root: edit(root, "inference.json", lambda c: c.pop("inferer")),
    "export": lambda root: edit(
        root, "inference.json", lambda c: c["network_def"].update(_target_="torch.nn.UninitializedLayer")
    ),
    "runs on tiny data": lambda root: edit(root, "train.json", lambda c: c.update(loss={"_target_": "NoSuchLoss"})),
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_goes_red_on_a_broken_bundle(
    name: str, own: Path, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(own, tmp_path / "broken")
    for config in ("train.json", "inference.json"):
        edit(root, config, lambda c: c.update(backbone="vit_test", image_size=64))
    sizes: dict[str, Any] = {"spatial_shape": [64, 64]}
    edit(root, "metadata.json", lambda c: c["network_data_format"]["inputs"]["image"].update(sizes))
    edit(root, "metadata.json", lambda c: c["network_data_format"]["outputs"]["pred"].update(sizes))
    make_weights(root)
    # only this check: the others are dealt with by their own case
    monkeypatch.setattr("pfedsam.bundle_tools.verify.CHECKS", {name: CHECKS[name]})
    (before,) = verify_bundle(Bundle(root, schema))
    assert before.passed, before.message
    BREAKS[name](root)
    (after,) = verify_bundle(Bundle(root, schema))
    assert not after.passed


def test_the_command_prints_a_line_for_each_check_and_fails_on_a_broken_bundle(
    own: Path, tmp_path: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfedsam.bundle_tools.verify.CHECKS", {"files": CHECKS["files"]})
    fine = CliRunner().invoke(app, ["verify-bundle", str(own), "--schema", str(schema)])
    assert (fine.exit_code, fine.output.startswith("ok")) == (0, True)
    broken = shutil.copytree(own, tmp_path / "broken")
    (broken / WEIGHTS).unlink()
    red = CliRunner().invoke(app, ["verify-bundle", str(broken), "--schema", str(schema)])
    assert red.exit_code == 1 and "FAILED" in red.output and "pfedsam bundle-weights" in red.output


def test_a_configuration_may_be_yaml_as_in_the_zoo(
    own: Path, tmp_path: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(own, tmp_path / "yaml")
    path = root / "configs" / "inference.json"
    path.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(path.read_text())))
    path.unlink()
    names = ("files", "properties of inference")
    monkeypatch.setattr("pfedsam.bundle_tools.verify.CHECKS", {name: CHECKS[name] for name in names})
    assert [check for check in verify_bundle(Bundle(root, schema)) if not check.passed] == []


@pytest.mark.parametrize(
    ("modality", "nested", "values"),
    [("mri", False, [[1], [2]]), ("grey", False, [[1], [2]]), ("rgb", True, [[1, 2], [2]])],
    ids=["mri", "grey", "rgb"],
)
def test_a_new_bundle_passes_and_trains_in_a_federation_and_infers(
    modality: Any, nested: bool, values: list, tmp_path: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLES_VARIABLE, str(tmp_path / "own"))
    root = with_a_file_of_weights(new_bundle("my_task", ["outer", "inner"], modality, tmp_path / "own", nested))
    assert json.loads((root / "configs" / "train.json").read_text())["class_values"] == values
    assert installed_bundles()["my_task"] == root
    cheap = ("files", "metadata", *(name for name in CHECKS if name.startswith("properties")), "runs on tiny data")
    monkeypatch.setattr("pfedsam.bundle_tools.verify.CHECKS", {name: CHECKS[name] for name in cheap})
    assert [check for check in verify_bundle(Bundle(root, schema)) if not check.passed] == []
    site = tiny_site(tmp_path / "site", 2, modality != "mri")
    settings = {"backbone": "vit_test", "image_size": 64, "batch_size": 2, "augmentations": 2}
    local = SiteTrainer("my_task", site, find_strategy("pfedsam").checked(), settings, tmp_path / "out")
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    result = local.train(0)
    assert all(np.isfinite(phase.mean_loss) for phase in result.phases.values())
    write(tmp_path / "model.safetensors", local.model(round=0, final=True))
    image = next((site / "images").iterdir())
    found = Predictor(tmp_path / "model.safetensors")(image)
    assert found.probabilities.shape == ((2, 48, 40, 6) if modality == "mri" else (2, 48, 40))


def test_a_new_bundle_with_a_wrong_name_is_refused(tmp_path: Path) -> None:
    wrong = (("../x", ["a"], "mri", "E16"), ("x", ["a", "a"], "mri", "E16"), ("x", ["a"], "ct", "E28"))
    for name, classes, modality, code in wrong:
        with pytest.raises(PFedSAMError, match=code):
            new_bundle(name, classes, modality, tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_two_gloo_processes_train_to_the_same_parameters(tmp_path: Path) -> None:
    """Each rank writes what it ended with; the losses are in the log."""
    site = tiny_site(tmp_path / "site", 1, rgb=False)
    root = folder("bundles") / "brain_lesion_mri"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    configs = [str(root / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    settings = {"backbone": "vit_test", "image_size": 64, "batch_size": 2, "max_epochs": 2, "val_interval": 1}
    everywhere = "$save_alone(@output_dir + '/rank' + str(dist.get_rank()) + '.safetensors', @network, @train#trainer)"
    code = (
        "from monai.bundle import run\n"
        f"run(config_file={configs!r}, meta_file={configs[0].replace('train', 'metadata')!r}, "
        f"bundle_root={str(root)!r}, "
        f"dataset_dir={str(site)!r}, output_dir={str(tmp_path)!r}, run=['$@train#trainer.run()', {everywhere!r}], "
        f"**{settings!r})\n"
    )
    processes = []
    for rank in range(2):
        group = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in group.items()}}
        processes.append(
            subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-2, text=True)
        )
    logs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs[0][-3000:]
    one, two = (read(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    for part in ("shared", "personal"):
        for name, tensor in getattr(one, part).items():
            assert np.array_equal(tensor.numpy(), getattr(two, part)[name].numpy()), name
    assert "train_loss: nan" not in logs[0] and "train_loss" in logs[0]
