"""Sites with images of each kind, a tiny model for each bundle, and a server that runs while a test does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import nifti
from PIL import Image

from pfedsam.bundles import network_of
from pfedsam.parameters import Roles
from pfedsam.storage.site_model import SiteModel, write
from pfedsam.viewer.server import ViewerServer
from pfedsam.viewer.session import Session

TINY: dict[str, Any] = {"backbone": "vit_test", "image_size": 32}
#: Right-anterior-superior in no axis.
AFFINE = np.array([[0, 0, -2.0, 40], [-3.0, 0, 0, 30], [0, 4.0, 0, -20], [0, 0, 0, 1]])


def tiny_model(path: Path, bundle: str, **overrides: Any) -> Path:
    """A model with random values in all that is trained, so that it finds something and its experts matter."""
    settings = {**TINY, **overrides}
    network = network_of(bundle, settings)
    random = torch.Generator().manual_seed(4)
    made = SiteModel.of(network, Roles(), bundle=bundle, overrides=settings, round=3, final=True)
    for part in (made.shared, made.personal):
        for name, tensor in part.items():
            part[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, made)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with a label, stored in axes of its own, and one without."""
    folder = tmp_path_factory.mktemp("viewer") / "hospital_a"
    values = np.random.default_rng(0).normal(100, 10, (24, 8, 20)).astype(np.float32)
    truth = np.zeros(values.shape, np.uint8)
    truth[4:12, 2:5, 6:15] = 1
    nifti(folder / "images" / "one.nii.gz", values + 80 * truth, AFFINE)
    nifti(folder / "labels" / "one.nii.gz", truth, AFFINE)
    nifti(folder / "images" / "two.nii.gz", values, AFFINE)
    return folder


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colour picture with two nested classes, wider than high, with a white corner at its top left."""
    folder = tmp_path_factory.mktemp("viewer") / "eyes"
    y, x = np.mgrid[:60, :80]
    colours = np.stack([200 - np.hypot(x - 50, y - 20), 90 + 0 * x, 40 + x], -1).clip(0, 255).astype(np.uint8)
    colours[:8, :8] = 255
    radius = np.hypot(x - 50, y - 20)
    truth = (radius < 14).astype(np.uint8) + (radius < 6)
    for kind, values in (("images", colours), ("labels", truth.astype(np.uint8))):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(values).save(folder / kind / "eye.png")
    Image.fromarray(colours[:9, :7]).save(folder / "images" / "tiny.png")
    return folder


@pytest.fixture(scope="module")
def brain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("brain") / "m.safetensors", "brain_lesion_mri", box_probability=0.5)


@pytest.fixture(scope="module")
def eye_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("eye") / "m.safetensors", "fundus_disc_cup")


@pytest.fixture
def serve() -> Iterator[Callable[[Session], ViewerServer]]:
    """Serves sessions in the background until the test ends."""
    started: list[tuple[ViewerServer, threading.Thread]] = []

    def start(session: Session) -> ViewerServer:
        server = ViewerServer(session)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
