"""A phantom site, a model that finds something, and a desk for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pfedsam.api import Model, load_model
from pfedsam.bundles import network_of
from pfedsam.clinic.desk import Desk
from pfedsam.data.phantom import write_phantom
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, write

TINY: dict[str, Any] = {"backbone": "vit_test", "image_size": 64}


def tiny_model(path: Path, bundle: str = "brain_lesion_mri", **overrides: Any) -> Path:
    """Random values in all that is trained, so that experts and boxes change what is found."""
    settings = {**TINY, **overrides}
    network = network_of(bundle, settings)
    random = torch.Generator().manual_seed(4)
    told = {"bundle": bundle, "overrides": settings, "round": 3, "final": True, "val_dice_personal": 0.744}
    made = SiteModel.of(network, Roles(), **told)
    for part in (made.shared, made.personal):
        for name, tensor in part.items():
            part[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
    write(path, made)
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "state.safetensors", box_probability=0.5)


@pytest.fixture(scope="session")
def model(model_file: Path) -> Model:
    return load_model(model_file, engine="torch")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The first of the phantom's sites, with one label taken away."""
    folder = write_phantom(tmp_path / "data", sites=1, cases=3, shape=(40, 44, 6))[0]
    sorted((folder / "labels").iterdir())[0].unlink()
    return folder


@pytest.fixture
def desk(site: Path, model: Model, tmp_path: Path) -> Desk:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Desk(site, model, scratch)
