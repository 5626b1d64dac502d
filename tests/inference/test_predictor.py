"""The predictor takes an image that was read already, and works on the device that it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import head, nifti

from pfedsam.data.arrays import picture_of
from pfedsam.data.reader import load_picture
from pfedsam.errors import PFedSAMError
from pfedsam.inference.predict import Predictor

AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])


def test_an_image_that_was_read_gives_what_its_path_gives(model: Path, tmp_path: Path) -> None:
    path = nifti(tmp_path / "scan.nii.gz", head((32, 28, 5)), AFFINE)
    predictor, picture = Predictor(model, device="cpu"), load_picture(path)
    found = predictor(picture)
    assert found.image is picture
    np.testing.assert_array_equal(found.probabilities, predictor(path).probabilities)


def test_an_image_that_goes_wrong_is_named_by_its_source(model: Path) -> None:
    flat = replace(picture_of(np.zeros((4, 4, 2)), AFFINE), affine=np.zeros((4, 4)), source=Path("<flat>"))
    with pytest.raises(PFedSAMError, match=r"E05.*<flat>"):
        Predictor(model)(flat)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(model: Path, device: str) -> None:
    with pytest.raises(PFedSAMError, match=f"E16.*'{device}'"):
        Predictor(model, device=device).open()


def test_the_network_is_on_the_device_that_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle's own choice would be the first GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    predictor = Predictor(model, device="cpu")
    predictor.open()
    assert {parameter.device.type for parameter in predictor._evaluator.network.parameters()} == {"cpu"}
    assert predictor._evaluator.state.device.type == "cpu"
