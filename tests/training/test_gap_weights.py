"""`weights: gaa`: sites whose training moves the predictions most count most, within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.files import read_lines
from pfedsam.parameters import shared_state
from pfedsam.training import federation
from pfedsam.training.aggregation import combine
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.distillation import bernoulli_kl
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.gap_weights import LARGEST_GAP, LEAST_GAP, STEP, GapWeights, rounded_gap
from pfedsam.training.prediction_gap import prediction_gap
from pfedsam.training.site import SiteTrainer
from pfedsam.training.site_weights import CEILING, FLOOR
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
TINY: dict[str, Any] = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
    "experts": 0,
}
PHASE = {"name": "train", "trains": ["shared"], "experts": False, "epochs": 1}


# the weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_grows_as_the_paper_says() -> None:
    """`w_k + gap_k / max gap * 0.05 / 3 * (1 - r / R)`, from 1 / K on; then on the simplex."""
    found, by_hand = GapWeights(), {site: 1 / 3 for site in "abc"}
    gaps = {"a": 0.01, "b": 0.04, "c": 0.02}
    for number in range(4):
        weights = found.next(gaps, number / 10)
        by_hand = {site: w + gaps[site] / 0.04 * STEP * (1 - number / 10) for site, w in by_hand.items()}
        by_hand = {site: w / sum(by_hand.values()) for site, w in by_hand.items()}
        assert weights == {site: pytest.approx(3 * w) for site, w in by_hand.items()}
    assert weights["a"] < weights["c"] < 1 < weights["b"]


def test_at_the_end_and_where_nothing_moves_the_weights_stay() -> None:
    weights = GapWeights()
    last = weights.next({"a": 0.5, "b": 0.1})
    assert weights.next({"a": 0.1, "b": 0.5}, 1.0) == pytest.approx(last)
    assert weights.next({"a": 0.0, "b": 0.0}) == pytest.approx(last)
    assert set(GapWeights().next({"a": None, "b": None}).values()) == {1.0}


def test_a_site_that_tells_nothing_counts_as_the_mean_of_the_others() -> None:
    silent = GapWeights().next({"a": 0.1, "b": 0.3, "c": None})
    assert silent == pytest.approx(GapWeights().next({"a": 0.1, "b": 0.3, "c": 0.2}))


@given(some.lists(some.lists(some.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=300))
def test_no_report_gives_more_than_the_ceiling_or_less_than_the_floor(reports: list[list[float]]) -> None:
    weights = GapWeights()
    for gaps in reports:
        found = list(weights.next(dict(zip("abc", gaps, strict=True))).values())
        assert sum(found) == pytest.approx(3)
        assert min(found) >= min(FLOOR * 3, 0.5) - 1e-9 and max(found) <= CEILING + 1e-9


def test_a_site_that_lies_in_every_round_gets_the_ceiling_and_no_more() -> None:
    weights = GapWeights()
    for _ in range(500):
        last = weights.next({"a": 0.001, "b": 0.001, "c": 0.001, "liar": 1e9})
    assert last["liar"] == pytest.approx(CEILING)


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.012345, 0.012), (0.98765, 0.99), (7.0, LARGEST_GAP), (LEAST_GAP / 2, 0.0), (0.0, 0.0), (-1e-9, 0.0)],
)
def test_a_gap_is_told_with_two_digits_and_a_cap(value: float, told: float) -> None:
    assert rounded_gap(value) == told == rounded_gap(told)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_not_told(value: float) -> None:
    assert rounded_gap(value) is None


@pytest.mark.parametrize("rule", ["mean", "median", "krum", "trimmed_mean"])
def test_a_rule_that_knows_no_weights_is_refused(rule: str) -> None:
    with pytest.raises(PFedSAMError, match=r"E16.*gaa.*norm_clipped"):
        Strategy.of({"weights": "gaa", "aggregation": rule})


# the gap --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gap") / "data"
    write_phantom(folder, sites=3, cases=6, shape=(32, 32, 4))
    return folder


def opened(data: Path, out: Path, weights: str) -> SiteTrainer:
    strategy = Strategy.of({"personal": [], "phases": [PHASE], "weights": weights})
    local = SiteTrainer("brain_lesion_mri", data / "site-1", strategy, TINY, out)
    local.open()
    local.receive(shared_state(local.network, strategy.roles), local.fingerprint)
    return local


def test_the_gap_is_the_divergence_of_the_predictions_after_from_those_before(data: Path, tmp_path: Path) -> None:
    local = opened(data, tmp_path, "gaa")
    assert prediction_gap(local.trainer, local.tensors.received, 0) == 0.0
    result = local.train(0)
    after = shared_state(local.network, local.strategy.roles)
    sampler: Any = getattr(local.trainer.data_loader, "sampler", None)
    sampler.set_draw(0, 1)
    items = list(sampler)
    images = torch.stack([sampler.dataset[item]["image"] for item in items])
    local.network.eval()
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        for theta in (after, local.tensors.received):
            local.network.load_state_dict(theta, strict=False)
            logits.append(local.trainer.logits(images, items))
    wanted = float(bernoulli_kl(logits[0], logits[1], 1.0).mean())
    assert wanted > 0 and result.gap == pytest.approx(rounded_gap(wanted), rel=0.1)


def test_it_is_computed_only_where_it_is_asked_for_and_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {}
    for weights in ("gaa", "uniform"):
        local = opened(data, tmp_path / weights, weights)
        for number in range(2):
            result = local.train(number)
        assert (result.gap is not None) == (weights == "gaa") and local.weight == 1
        ends[weights] = result.delta
    assert all(torch.equal(tensor, ends["uniform"][name]) for name, tensor in ends["gaa"].items())


# the federation -------------------------------------------------------------------------------------------------------


def test_a_federation_weighs_by_the_gaps_in_its_history_also_after_a_stop(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = {path.name: path for path in sorted(data.iterdir()) if path.is_dir()}
    strategy = find_strategy("weights_gaa").checked()
    short = strategy.model_copy(update={"phases": (strategy.phases[0].model_copy(update={"epochs": 1}),)})
    counted: list[list[float]] = []

    def kept(theta: Any, deltas: Any, weights: Any, *how: Any, **more: Any) -> Any:
        counted.append(list(weights))
        return combine(theta, deltas, weights, *how, **more)

    monkeypatch.setattr(federation, "combine", kept)
    whole, parts = (Federation("brain_lesion_mri", sites, short, tmp_path / out, 3, TINY) for out in ("a", "b"))
    run_federation(whole)
    reference = GapWeights()
    for number, weights in enumerate(counted):
        told = {note["site"]: note["gap"] for note in whole.history() if note["round"] == number}
        assert len(set(told.values())) > 1, "sites that do not differ say nothing here"
        assert weights == list(reference.next(told, number / 3).values())

    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2 * len(sites) + 1:  # in the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(parts, stop)
    run_federation(parts)
    assert counted[:3] == [pytest.approx(one, abs=1e-3) for one in counted[3:]]


def test_a_history_without_it_has_no_gap(data: Path, tmp_path: Path) -> None:
    strategy = Strategy.of({"personal": [], "phases": [PHASE], "weights": "dro"})
    one = Federation("brain_lesion_mri", {"site-1": data / "site-1"}, strategy, tmp_path, 1, TINY)
    run_federation(one)
    assert all("gap" not in note for note in read_lines(tmp_path / "history.jsonl"))
