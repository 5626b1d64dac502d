"""A federation on SAM's own ViT-B: real architecture and size, weights filled from a seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from pfedsam.data.phantom import write_phantom
from pfedsam.networks.model import SegmentAnything

pytestmark = pytest.mark.slow


def test_two_sites_train_two_rounds_of_vit_b_at_224_pixels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = SegmentAnything("vit_b", 1024, 4).state_dict()
    filled = {}
    for name, tensor in state.items():
        value = torch.randn(tensor.shape, generator=generator) * 0.02
        filled[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    torch.save(filled, tmp_path / "random_vit_b.pth")
    data = tmp_path / "phantom"
    write_phantom(data, sites=2, cases=4, shape=(48, 48, 6))
    settings = {
        "backbone": "vit_b",
        "image_size": 224,
        "adapted_blocks": 2,
        "batch_size": 2,
        "augmentations": 1,
        "positives_per_case": 1,
        "negatives_per_case": 1,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pfedsam.cli", "simulate", str(data), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PFEDSAM_CHECKPOINT": str(tmp_path / "random_vit_b.pth"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--rounds", "2", "--validate-every", "2", *overrides],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["sites"]) == {"site-1", "site-2"}
    assert 0 < results["sites"]["site-1"]["bytes_per_round"] <= 3.2e6
    assert len(list((tmp_path / "run" / "state").glob("simulation/*/*/state.safetensors"))) == 2
