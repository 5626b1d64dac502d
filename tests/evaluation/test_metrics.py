"""Metrics: their properties, the empty cases, spacing, and agreement with MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric, SurfaceDistanceMetric

from pfedsam.evaluation.metrics import TOLERANCE, case_metrics

SHAPE = (1, 7, 6, 5)
masks = hnp.arrays(np.bool_, SHAPE).map(torch.from_numpy)
spacings = st.tuples(*[st.floats(0.5, 5.0)] * 3)


@given(masks, masks, spacings)
@settings(max_examples=150, deadline=None)
def test_symmetry_and_bounds(one: torch.Tensor, other: torch.Tensor, spacing: tuple) -> None:
    a, b = case_metrics(one, other, spacing), case_metrics(other, one, spacing)
    diagonal = float(np.linalg.norm(np.asarray(SHAPE[1:]) * spacing))
    for metric in ("dice", "hd95", "asd", "nsd"):
        assert getattr(a, metric) == pytest.approx(getattr(b, metric), abs=1e-5)
    assert 0 <= a.dice[0] <= 1
    assert -1e-6 <= a.nsd[0] <= 1 + 1e-6
    assert 0 <= a.asd[0] <= diagonal + 1e-4
    assert 0 <= a.hd95[0] <= diagonal + 1e-4
    assert all(math.isfinite(value) for value in (*a.dice, *a.hd95, *a.asd, *a.nsd))


@given(masks, spacings)
@settings(max_examples=50, deadline=None)
def test_identity(mask: torch.Tensor, spacing: tuple) -> None:
    found = case_metrics(mask, mask, spacing)
    assert (found.dice, found.hd95, found.asd, found.nsd) == ((1.0,), (0.0,), (0.0,), (1.0,))
    assert found.failed == (False,)


def test_empty_prediction_is_a_failure_that_costs() -> None:
    label = torch.zeros(2, 3, 4, 12)
    label[0, 1, 1, 1] = 1
    found = case_metrics(torch.zeros_like(label), label, (1, 1, 1))
    assert found.failed == (True, False)
    assert found.dice == (0.0, 1.0)
    assert found.hd95 == (13.0, 0.0)
    assert found.asd == (13.0, 0.0)
    assert found.nsd == (0.0, 1.0)


def test_a_prediction_where_there_is_nothing_costs_and_is_no_failure() -> None:
    prediction = torch.zeros(1, 3, 4, 12)
    prediction[0, 1, 1, 1] = 1
    found = case_metrics(prediction, torch.zeros_like(prediction))
    assert (found.failed, found.dice, found.hd95, found.nsd) == ((False,), (0.0,), (13.0,), (0.0,))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_anisotropic_spacing_scales_the_distance_along_its_axis(axis: int) -> None:
    spacing = [1.0, 2.0, 3.0]
    one, other = torch.zeros(1, 12, 12, 12), torch.zeros(1, 12, 12, 12)
    here, there = [2, 2, 2], [2, 2, 2]
    there[axis] += 5
    one[(0, *here)], other[(0, *there)] = 1, 1
    found = case_metrics(one, other, spacing)
    assert found.hd95[0] == pytest.approx(5 * spacing[axis])
    assert found.asd[0] == pytest.approx(5 * spacing[axis])
    assert found.nsd == (0.0,)


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        case_metrics(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))


def test_two_dimensional_images() -> None:
    one, other = torch.zeros(1, 9, 9), torch.zeros(1, 9, 9)
    one[0, 2:5, 2:5], other[0, 2:5, 3:6] = 1, 1
    found = case_metrics(one, other)
    assert found.dice[0] == pytest.approx(2 / 3)
    assert found.hd95 == (1.0,)
    assert found.nsd == (1.0,)


@pytest.mark.parametrize("pairs", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_agreement_with_monai_on_many_pairs(pairs: int) -> None:
    random = np.random.default_rng(0)
    spacing = (1.0, 1.5, 2.5)
    metrics = {
        "dice": DiceMetric(include_background=True),
        "hd95": HausdorffDistanceMetric(include_background=True, percentile=95),
        "asd": SurfaceDistanceMetric(include_background=True, symmetric=True),
        "nsd": SurfaceDiceMetric([TOLERANCE], include_background=True),
    }
    for _ in range(pairs):
        # blobs that differ, and now and then touch the border
        size = random.integers(6, 12, 3)
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        pair = []
        for _ in range(2):
            centre, radius = random.uniform(0, size), random.uniform(1.5, 5)
            pair.append(torch.from_numpy(((grid - centre) ** 2).sum(-1) <= radius**2)[None])
        prediction, label = pair
        if not prediction.any() or not label.any():
            continue
        found = case_metrics(prediction, label, spacing)
        for name, metric in metrics.items():
            settings_ = {} if name == "dice" else {"spacing": spacing}
            wanted = metric(prediction[None].float(), label[None].float(), **settings_)
            assert getattr(found, name)[0] == pytest.approx(float(wanted), abs=1e-4), name
