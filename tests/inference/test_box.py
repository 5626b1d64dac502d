"""A box as a prompt: it goes the way of the image, whatever its orientation; outside of its slices is background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.inference import predict as room
from pfedsam.inference.predict import Predictor
from pfedsam.parameters import shared_state
from pfedsam.storage.site_model import write
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer

TINY = {"backbone": "vit_test", "image_size": 64, "batch_size": 2, "augmentations": 1, "box_probability": 0.7}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A site and a model that was trained with boxes."""
    folder = tmp_path_factory.mktemp("box")
    site = tiny_site(folder / "site", 1, rgb=False)
    local = SiteTrainer("brain_lesion_mri", site, find_strategy("pfedsam").checked(), TINY, folder / "out")
    local.open()
    assert local.trainer.box_probability == 0.7
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    report = local.train(0).phases["global"]
    assert np.isfinite(report.mean_loss)
    write(folder / "model.safetensors", local.model(round=0, final=True))
    return site, folder / "model.safetensors"


def test_a_box_may_come_after_an_image_without_one(trained: tuple[Path, Path]) -> None:
    image = next((trained[0] / "images").iterdir())
    box = [10, 30, 10, 30]
    asked = Predictor(trained[1])
    first = asked(image, box).probabilities
    asked(image)
    assert np.array_equal(asked(image, box).probabilities, first)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR"])
def test_the_box_of_the_network_is_the_box_of_the_image(
    trained: tuple[Path, Path], tmp_path: Path, axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(100, 10, (64, 64, 8)).astype(np.float32)
    inside = np.zeros(values.shape, bool)
    inside[10:31, 40:51, 2:5] = True
    to = nib.orientations.axcodes2ornt(tuple(axes))
    affine = np.diag([4.0, 4.0, 5.0, 1.0])
    image = nib.Nifti1Image(values, affine).as_reoriented(to)
    turned = np.asarray(nib.Nifti1Image(inside.astype(np.uint8), affine).as_reoriented(to).dataobj)
    nib.save(image, tmp_path / "a.nii.gz")
    found = np.argwhere(turned)
    box = [int(v) for pair in zip(found.min(0), found.max(0), strict=True) for v in pair]
    seen: list[Any] = []
    original = room.PromptedSliceInferer

    def spy(boxes: Any, **kwargs: Any) -> Any:
        seen.append(boxes)
        return original(boxes, **kwargs)

    monkeypatch.setattr(room, "PromptedSliceInferer", spy)
    found = Predictor(trained[1])(tmp_path / "a.nii.gz", box)
    (boxes,) = seen
    given = ~boxes.isnan().any(dim=1)
    assert given.nonzero().flatten().tolist() == [2, 3, 4]
    # x0 y0 x1 y1 with x along the last axis of the network's input; one pixel is 4 mm as one voxel is
    assert np.allclose(boxes[2].numpy(), [40, 10, 50, 30], atol=1)
    probabilities = found.probabilities[0]
    assert probabilities.shape == turned.shape
    slices = np.moveaxis(probabilities, axes.index("S"), 0)
    outside = ~np.moveaxis(turned, axes.index("S"), 0).any(axis=(1, 2))
    assert slices[outside].max() < 1e-3


def test_a_small_box_says_nothing_of_its_image(trained: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    site, file = trained
    Predictor(file)(site / "images" / "tiny0.nii.gz", [10, 11, 10, 11, 2, 2])
    assert "tiny0" not in caplog.text


def test_a_box_is_refused_outside_the_image_and_for_a_model_without_boxes(
    trained: tuple[Path, Path], model: Path
) -> None:
    site, file = trained
    image = site / "images" / "tiny0.nii.gz"
    with pytest.raises(PFedSAMError, match=r"E16.*not inside"):
        Predictor(file)(image, [0, 48, 0, 10])
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(site / "p.png")
    with pytest.raises(PFedSAMError, match=r"E16.*6 numbers.*p\.png has 2 axes"):
        Predictor(file)(site / "p.png", [0, 9, 0, 10, 0, 0])
    with pytest.raises(PFedSAMError, match=r"E32.*trained with boxes"):
        Predictor(model)(image, [0, 10, 0, 10])
    wrong = CliRunner().invoke(app, ["infer", str(image), "--model", str(file), "--box", "1,2,x,4"])
    assert wrong.exit_code == 2


def test_a_box_is_computed_by_torch_whatever_the_engine(trained: tuple[Path, Path]) -> None:
    site, file = trained
    image, box = site / "images" / "tiny0.nii.gz", [10, 31, 10, 31, 1, 3]
    found = [Predictor(file, engine=engine)(image, box).probabilities for engine in ("torch", "onnx")]
    np.testing.assert_array_equal(*found)
    assert not list(file.parent.glob(".*.onnx"))
