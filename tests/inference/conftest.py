"""A tiny personal model, as a site would have it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedsam.bundles import network_of
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, write

TINY = {"backbone": "vit_test", "image_size": 64}
BUNDLE = "brain_lesion_mri"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random values in everything that is trained, so that predictions have shapes and the experts matter."""
    path = tmp_path_factory.mktemp("model") / "state.safetensors"
    network = network_of(BUNDLE, TINY)
    random = torch.Generator().manual_seed(4)
    told = {"bundle": BUNDLE, "overrides": TINY, "round": 3, "final": True}
    made = SiteModel.of(network, Roles(), **told)
    for part in (made.shared, made.personal):
        for name, tensor in part.items():
            part[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
    made.moments = {"x#step": torch.ones(1)}
    write(path, made)
    return path
