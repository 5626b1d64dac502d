"""Inversion in slabs gives what MONAI's inversion of the whole gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Spacingd

from pfedsam.inference.resampling import SlabSpacingd

OBLIQUE = np.array([[0.9, -0.4, 0, 5], [0.4, 0.9, 0, -3], [0, 0, 3.0, 1], [0, 0, 0, 1]])


@pytest.mark.parametrize("depth_mm", [-1, 2.0], ids=["within the plane", "in all axes"])
@pytest.mark.parametrize("affine", [np.diag([0.7, 0.8, 3.0, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_slabs_equal_the_whole(affine: np.ndarray, depth_mm: float) -> None:
    values = torch.rand(1, 40, 30, 37, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (Spacingd, SlabSpacingd):
        way = Compose([kind("image", (2.0, 2.0, depth_mm), mode="bilinear", dtype=torch.float32)])
        item = way({"image": MetaTensor(values.clone(), affine=torch.as_tensor(affine))})
        item["pred"] = MetaTensor(torch.cat([item["image"].as_tensor(), item["image"].as_tensor() ** 2]))
        found.append(Invertd("pred", way, "image", nearest_interp=False)(item)["pred"])
    whole, slabs = found
    assert slabs.shape == (2, *values.shape[1:])
    torch.testing.assert_close(slabs.as_tensor(), whole.as_tensor(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(slabs.affine, whole.affine)
    assert slabs.applied_operations == whole.applied_operations == []
