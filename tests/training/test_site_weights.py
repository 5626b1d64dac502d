"""Sites where the global model is worst count most: on the simplex, within bounds, and the same at the server."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.training import federation
from pfedsam.training.aggregation import combine
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.site_weights import CEILING, FLOOR, SiteWeights, on_simplex
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)


@given(some.lists(some.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_weights_lie_on_the_simplex_within_their_bounds(values: list[float]) -> None:
    found = on_simplex(values)
    count = len(values)
    assert sum(found) / count == pytest.approx(1)
    assert min(found) >= min(FLOOR * count, 0.5) - 1e-9 and max(found) <= CEILING + 1e-9
    order = sorted(range(count), key=values.__getitem__)
    assert all(found[a] <= found[b] + 1e-9 for a, b in itertools.pairwise(order))


def test_a_site_where_the_model_is_worse_counts_more_each_round() -> None:
    weights = SiteWeights()
    first = weights.next({"a": 0.8, "b": 0.8, "c": 0.2})
    second = weights.next({"a": 0.8, "b": 0.8, "c": 0.2})
    assert first["a"] == first["b"] < 1 < first["c"] < second["c"]
    assert first["c"] / first["a"] == pytest.approx(math.exp(0.5 * 0.6))
    for _ in range(50):
        last = weights.next({"a": 0.8, "b": 0.8, "c": 0.0})
    assert last["c"] == pytest.approx(CEILING) and last["a"] == pytest.approx(0.5)


def test_equal_dice_none_at_all_and_a_late_site_change_nothing() -> None:
    assert set(SiteWeights().next({"a": 0.5, "b": 0.5}).values()) == {1.0}
    assert set(SiteWeights().next({"a": None, "b": None}).values()) == {1.0}
    weights = SiteWeights()
    weights.next({"a": 0.9, "b": 0.1})
    assert weights.next({"a": 0.5, "b": 0.5, "late": None})["late"] == pytest.approx(1, abs=0.05)


def test_a_dice_counts_as_it_is_sent() -> None:
    assert SiteWeights().next({"a": 0.504, "b": 0.1}) == SiteWeights().next({"a": 0.50, "b": 0.1})


@pytest.mark.parametrize("rule", ["mean", "median", "krum", "trimmed_mean"])
def test_a_rule_that_knows_no_weights_is_refused(rule: str) -> None:
    with pytest.raises(PFedSAMError, match=r"E16.*dro.*norm_clipped"):
        Strategy.of({"weights": "dro", "aggregation": rule})


def test_a_federation_that_was_stopped_goes_on_with_the_weights_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_phantom(tmp_path / "data", sites=3, cases=6, shape=(32, 32, 4))
    sites = {path.name: path for path in sorted((tmp_path / "data").iterdir()) if path.is_dir()}
    phase = {"name": "train", "trains": ["shared"], "experts": False, "epochs": 1}
    strategy = Strategy.of({"personal": [], "phases": [phase], "weights": "dro"})
    tiny: dict[str, Any] = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "augmentations": 1, "experts": 0}
    counted: list[list[float]] = []

    def kept(theta: Any, deltas: Any, weights: Any, *how: Any, **more: Any) -> Any:
        counted.append(list(weights))
        return combine(theta, deltas, weights, *how, **more)

    monkeypatch.setattr(federation, "combine", kept)
    whole, parts = (Federation("brain_lesion_mri", sites, strategy, tmp_path / out, 3, tiny) for out in ("a", "b"))
    run_federation(whole)
    assert len({round(one, 6) for one in counted[0]}) > 1, "sites that do not differ say nothing here"
    assert counted[0] != counted[1]

    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2 * len(sites) + 1:  # in the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(parts, stop)
    run_federation(parts)
    assert counted[:3] == [pytest.approx(one, abs=1e-4) for one in counted[3:]]
