"""A bundle that is run alone gives the personal model of a strategy that has a copy of the shared tensors, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import head, nifti
from monai.bundle import ConfigWorkflow

from pfedsam.bundle_tools.new import new_bundle
from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.bundles import BUNDLES_VARIABLE, LOAD_MODEL, LOAD_MODEL_BEFORE, find_bundle, folder, network_of
from pfedsam.comparison.provenance import bundle_hash
from pfedsam.inference.predict import Predictor
from pfedsam.parameters import COPY
from pfedsam.storage.site_model import SiteModel
from pfedsam.training.catalogue import find_strategy

TINY = {"backbone": "vit_test", "image_size": 64, "experts": 0}
BUNDLES = ("brain_lesion_mri", "fundus_disc_cup", "prostate_mri")
#: `bundle_hash` of each bundle in the records that there are.
HASHES = {
    "brain_lesion_mri": "487abda92786143f",
    "fundus_disc_cup": "5f33b5a4e262e43e",
    "prostate_mri": "71ff1f9e212e1ae4",
}


def models(bundle: str, out: Path) -> dict[str, Path]:
    """A model with a copy (`both`), and one without for each of its sides: the `shared` tensors, the site's `own`."""
    roles = find_strategy("fedavg_lora_ft").checked().roles

    def made(seed: int) -> SiteModel:
        random = torch.Generator().manual_seed(seed)
        model = SiteModel.of(network_of(bundle, TINY), roles, bundle=bundle, overrides=TINY, round=3)
        for name, tensor in model.shared.items():
            model.shared[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
        return model

    found = {"shared": made(4), "own": made(5), "both": made(4)}
    found["both"].personal = {COPY + name: tensor for name, tensor in found["own"].shared.items()}
    for name, model in found.items():
        model.save(out / f"{name}.safetensors")
    return {name: out / f"{name}.safetensors" for name in found}


def evaluated(bundle: str, site: Path, model: Path, experts: bool, out: Path) -> tuple[float, np.ndarray]:
    """Dice that `evaluate.json` tells of a model, and the logits of its network for an image."""
    configs = find_bundle(bundle) / "configs"
    workflow = ConfigWorkflow(
        config_file=[str(configs / "train.json"), str(configs / "evaluate.json")],
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        bundle_root=str(configs.parent),
        dataset_dir=str(site),
        output_dir=str(out),
        model_file=str(model),
        experts_on=experts,
        **TINY,
    )
    workflow.initialize()
    workflow.run()
    evaluator = workflow.parser.get_parsed_content("validate#evaluator")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = evaluator.network.eval()(image.to(evaluator.state.device)).cpu().numpy()
    return evaluator.state.metrics["val_dice"], logits


@pytest.mark.parametrize("bundle", ["brain_lesion_mri", "fundus_disc_cup"])
def test_evaluation_alone_gives_the_personal_and_the_global_numbers(bundle: str, tmp_path: Path) -> None:
    files, site = models(bundle, tmp_path), tiny_site(tmp_path / "site", 1, bundle == "fundus_disc_cup")

    def of(name: str, experts: bool) -> tuple[float, np.ndarray]:
        return evaluated(bundle, site, files[name], experts, tmp_path / "out")

    for experts, side in ((True, "own"), (False, "shared")):
        dice, logits = of("both", experts)
        expected_dice, expected = of(side, experts)
        np.testing.assert_array_equal(logits, expected)
        assert dice == pytest.approx(expected_dice, nan_ok=True)
    assert (of("own", True)[1] != of("shared", False)[1]).any()


def same_as_its_sides(bundle: str, image: Path, files: dict[str, Path]) -> None:
    """The predictor's answers of a model with a copy are those of its two sides."""

    def of(name: str, experts: bool) -> np.ndarray:
        return Predictor(files[name], bundle=bundle, experts=experts)(image).probabilities

    np.testing.assert_array_equal(of("both", True), of("own", True))
    np.testing.assert_array_equal(of("both", False), of("shared", False))
    assert (of("own", True) != of("shared", False)).any()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_inference_gives_the_personal_and_the_global_model(bundle: str, tmp_path: Path) -> None:
    image = nifti(tmp_path / "scan.nii.gz", head((32, 28, 5)), np.diag([4.0, 4.0, 5.0, 1.0]))
    if bundle == "fundus_disc_cup":
        image = next((tiny_site(tmp_path / "site", 2, rgb=True) / "images").iterdir())
    same_as_its_sides(bundle, image, models(bundle, tmp_path))


def test_a_bundle_with_the_two_lines_of_before_gives_the_personal_model_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a user's own: nobody else can mend it."""
    monkeypatch.setenv(BUNDLES_VARIABLE, str(tmp_path / "own"))
    config = new_bundle("my_task", ["lesion"], "mri", tmp_path / "own") / "configs" / "inference.json"
    content = json.loads(config.read_text())
    imports = [*content["imports"], "$from pfedsam.site_model import read as read_model"]
    config.write_text(json.dumps({**content, "imports": imports, "initialize": list(LOAD_MODEL_BEFORE)}))
    image = nifti(tmp_path / "scan.nii.gz", head((32, 28, 5)), np.diag([4.0, 4.0, 5.0, 1.0]))
    same_as_its_sides("my_task", image, models("my_task", tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [("inference.json", "$load_model(@network, @model_file, @experts_on)"), ("evaluate.json", LOAD_MODEL)],
)
@pytest.mark.parametrize("bundle", [*BUNDLES, "new mri", "new rgb"])
def test_a_configuration_loads_a_model_by_the_one_line(bundle: str, name: str, line: str, tmp_path: Path) -> None:
    root = folder("bundles") / bundle
    if bundle.startswith("new"):
        root = new_bundle("new", ["a"], "rgb" if bundle == "new rgb" else "mri", tmp_path)
    text = (root / "configs" / name).read_text()
    assert line in json.loads(text)["initialize"]
    assert not any(line in text for line in LOAD_MODEL_BEFORE)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_hash_in_the_records_is_that_of_the_bundle(bundle: str) -> None:
    """It is of what a bundle does; the line that loads a model counts as the two lines that it replaced."""
    assert bundle_hash(bundle) == HASHES[bundle]


def test_any_other_step_of_an_evaluation_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUNDLES_VARIABLE, str(tmp_path))
    config = new_bundle("my_task", ["a"], "mri", tmp_path) / "configs" / "evaluate.json"
    content: dict[str, Any] = json.loads(config.read_text())
    before, steps = bundle_hash("my_task"), content["initialize"]
    place = steps.index(LOAD_MODEL)
    for replaced, same in ((LOAD_MODEL_BEFORE, True), (LOAD_MODEL_BEFORE[:1], False), (("$None",), False)):
        config.write_text(json.dumps({**content, "initialize": [*steps[:place], *replaced, *steps[place + 1 :]]}))
        assert (bundle_hash("my_task") == before) is same
