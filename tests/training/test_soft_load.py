"""`load`: m = 1 is FedAvg and m = 0 is every site alone, bit for bit; m and a site's own tensors stay there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from torch import Tensor

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY, ROUND_KEY, check_result
from pfedsam.federated.plan import Plan
from pfedsam.parameters import COPY, shared_state
from pfedsam.storage.site_model import read
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.drift import drift
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.site import SiteTrainer
from pfedsam.training.soft_load import blended
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
SITES, ROUNDS, BUNDLE = ("site-1", "site-2"), 3, "brain_lesion_mri"
TINY: dict[str, Any] = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
    "experts": 0,
}
GROUPS = ("lora_a", "lora_b", "decoder_subset")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "data"
    write_phantom(folder, sites=len(SITES), cases=6, shape=(32, 32, 6))
    return folder


def strategy(load: dict[str, Any] | None, moments: bool = False, **more: Any) -> Strategy:
    phase = {"name": "train", "trains": ["shared"], "experts": False, "rates": {"lora_b": 4, "decoder_subset": 0.4}}
    phases = [{**phase, "keep_moments": moments, "inverse_time_decay": 0.5}]
    return Strategy.of({"name": "x", "shared": GROUPS, "personal": [], "phases": phases, "load": load, **more})


def alone(moments: bool = False) -> Strategy:
    """`local_only` with the phase of the others."""
    phase = strategy(None, moments).phases[0].model_dump() | {"trains": ["personal"]}
    return Strategy.of({"name": "x", "shared": [], "personal": GROUPS, "phases": [phase]})


def ran(data: Path, out: Path, how: Strategy, together: bool = True, **overrides: Any) -> Federation:
    one = Federation(BUNDLE, {site: data / site for site in SITES}, how, out, ROUNDS, TINY | overrides)
    run_federation(one, aggregated=together)
    return one


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# the two ends ---------------------------------------------------------------------------------------------------------


def test_m_of_1_is_fedavg_bit_for_bit(data: Path, tmp_path: Path) -> None:
    usual = ran(data, tmp_path / "usual", strategy(None))
    loaded = ran(data, tmp_path / "loaded", strategy({"mode": "share", "share": 1.0}))
    assert equal(usual.global_model()[0], loaded.global_model()[0])
    for site in SITES:  # and so is the model that a site serves
        assert equal(read(loaded.model_of(site)).copy, usual.global_model()[0])


@pytest.mark.parametrize("moments", [False, True])
def test_m_of_0_is_every_site_alone_bit_for_bit(data: Path, tmp_path: Path, moments: bool) -> None:
    single = ran(data, tmp_path / "alone", alone(moments), together=False)
    loaded = ran(data, tmp_path / "loaded", strategy({"mode": "share", "share": 0.0}, moments))
    for site in SITES:
        assert equal(read(loaded.model_of(site)).copy, read(single.model_of(site)).personal)
    ends = [read(loaded.model_of(site)).copy for site in SITES]
    assert not equal(*ends)


def test_what_is_sent_is_the_difference_to_the_global_model_as_received(data: Path, tmp_path: Path) -> None:
    local = opened(data, tmp_path, {"mode": "share", "share": 0.0})
    theta = local.tensors.received
    for number in range(2):
        theta = {name: tensor + 0.25 * number for name, tensor in theta.items()}
        local.receive(theta, local.fingerprint)
        result = local.train(number)
        trained = shared_state(local.network, local.strategy.roles)
        assert equal(local.tensors.copy, trained)
        assert equal(result.delta, {name: tensor - theta[name] for name, tensor in trained.items()})


@pytest.mark.parametrize(
    "mode", [pytest.param("smooth", marks=pytest.mark.slow), pytest.param("binary", marks=pytest.mark.slow), "learned"]
)
def test_a_stopped_run_goes_on_with_what_was_a_sites_own(data: Path, tmp_path: Path, mode: str) -> None:
    # without a cache: features that are computed in other batches after a stop are rounded otherwise
    whole = ran(data, tmp_path / "whole", strategy({"mode": mode}), cache_limit_gb=0.0)
    parts = Federation(BUNDLE, whole.sites, whole.strategy, tmp_path / "parts", ROUNDS, whole.overrides)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == len(SITES) * 2 + 1:  # in the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(parts, stop)
    run_federation(parts)
    assert equal(whole.global_model()[0], parts.global_model()[0])
    for site in SITES:
        assert equal(read(whole.model_of(site)).copy, read(parts.model_of(site)).copy)


# the load -------------------------------------------------------------------------------------------------------------


def opened(data: Path, out: Path, load: dict[str, Any]) -> SiteTrainer:
    local = SiteTrainer(BUNDLE, data / "site-1", strategy(load), TINY, out)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    return local


def state(scale: float, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"qkv.lora_a": (2, 4, 12), "qkv.lora_b": (2, 9, 4), "fc.lora_a": (4, 6), "w": (5, 3)}
    return {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def test_the_drift_is_that_of_the_rank_one_products_and_of_whole_tensors() -> None:
    own, received, start = state(1, 1), state(2, 2), state(0.1, 3)
    found = drift(own, received, start)
    assert {unit: tuple(one.shape) for unit, one in found.items()} == {"qkv": (2, 4), "fc": (4,), "w": ()}

    def by_hand(mine: Tensor, theirs: Tensor) -> float:
        return float((mine - theirs).norm() / (mine.norm() + theirs.norm()))

    for part in range(2):
        for rank in range(4):
            products = [
                torch.outer(one["qkv.lora_b"][part, :, rank], one["qkv.lora_a"][part, rank]) for one in (own, received)
            ]
            assert float(found["qkv"][part, rank]) == pytest.approx(by_hand(*products), rel=1e-4)
    for rank in range(4):
        rows = [(one["fc.lora_a"] - start["fc.lora_a"])[rank] for one in (own, received)]
        assert float(found["fc"][rank]) == pytest.approx(by_hand(*rows), rel=1e-4)
    whole = [one["w"] - start["w"] for one in (own, received)]
    assert float(found["w"]) == pytest.approx(by_hand(*whole), rel=1e-4)


def test_the_drift_is_from_0_to_1_and_knows_no_scale_between_the_factors() -> None:
    own, start = state(1, 1), {name: torch.zeros_like(one) for name, one in state(1, 1).items()}
    assert all(not one.any() for one in drift(own, own, start).values())
    assert all(not one.any() for one in drift(start, start, start).values())
    rescaled = {**own, "qkv.lora_a": own["qkv.lora_a"] * 3, "qkv.lora_b": own["qkv.lora_b"] / 3}
    assert float(drift(own, rescaled, start)["qkv"].max()) < 1e-3
    opposite = {name: -one for name, one in own.items()} | {"qkv.lora_a": own["qkv.lora_a"]}
    for one in (drift(own, opposite, start), drift(own, start, start)):
        assert all(torch.allclose(value, torch.ones_like(value)) for value in one.values())


def test_a_unit_is_loaded_as_one() -> None:
    own, received = state(1, 1), state(1, 2)
    shares = {
        "qkv": torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.0] * 4]).double(),
        "fc": torch.ones(4),
        "w": torch.zeros(()),
    }
    found = blended(own, received, shares)
    assert torch.equal(found["fc.lora_a"], received["fc.lora_a"]) and torch.equal(found["w"], own["w"])
    for name in ("qkv.lora_a", "qkv.lora_b"):
        mine, theirs, got = (one[name][0] if name.endswith("a") else one[name][0].T for one in (own, received, found))
        assert torch.equal(got[0], theirs[0]) and torch.equal(got[1], mine[1])
        torch.testing.assert_close(got[2], 0.25 * theirs[2] + 0.75 * mine[2])
        assert torch.equal(found[name][1], own[name][1])


@pytest.mark.parametrize(
    "mode", [pytest.param("smooth", marks=pytest.mark.slow), pytest.param("binary", marks=pytest.mark.slow), "learned"]
)
def test_m_is_from_0_to_1_and_what_was_learned_lowers_the_loss(data: Path, tmp_path: Path, mode: str) -> None:
    local = opened(data, tmp_path, {"mode": mode, "threshold": 0.6, "steps": 4})
    local.train(0)
    # as after a mean in which the others have gone another way in part
    random = torch.Generator().manual_seed(0)
    theta = {
        name: one.lerp(local.tensors.copy[name], (0.1, 1.5)[number % 2] * torch.rand(one.shape, generator=random))
        for number, (name, one) in enumerate(local.tensors.received.items())
    }
    local.receive(theta, local.fingerprint)
    load = local._load
    assert load is not None
    own, received = local.tensors.copy, local.tensors.received
    before = {name: one.requires_grad for name, one in local.network.named_parameters() if name not in own}
    shares = load._shares(own, received, 1)
    values = torch.cat([one.flatten() for one in shares.values()])
    assert values.min() >= 0 and values.max() <= 1 and len(values.unique()) > 1
    if mode == "binary":
        assert set(values.tolist()) == {0.0, 1.0}
    if mode == "learned":
        start = {unit: torch.ones_like(one) for unit, one in shares.items()}
        assert loss(local, blended(own, received, shares)) < loss(local, blended(own, received, start))
        assert all(one.grad is None for one in local.network.parameters()) and not any(before.values())


def loss(local: SiteTrainer, theta: dict[str, Tensor]) -> float:
    from pfedsam.training.prediction_gap import slices_of_round

    local.network.load_state_dict(theta, strict=False)
    local.network.eval()
    with torch.no_grad():
        found = [
            local.trainer.loss_function(local.trainer.logits(images, items), label).mean()
            for images, label, items in slices_of_round(local.trainer, 1)
        ]
    return float(torch.stack(found).mean())


def test_a_round_that_was_stopped_leaves_what_was_a_sites_own(data: Path, tmp_path: Path) -> None:
    local = opened(data, tmp_path, {"mode": "smooth"})
    local.train(0)
    own = local.tensors.copy
    local.trainer.should_stop = lambda: local.trainer.report.steps == 2
    local.train(1)
    assert local.tensors.copy is own
    assert equal(shared_state(local.network, local.strategy.roles), local.tensors.received)


# what leaves ----------------------------------------------------------------------------------------------------------


def test_a_sites_own_tensors_pass_no_filter(data: Path, tmp_path: Path) -> None:
    """As such: who knows the global model and the update has their sum, as in every federation."""
    local = opened(data, tmp_path, {"mode": "smooth"})
    theta = local.tensors.received
    for number in range(2):
        local.receive({name: one + 0.25 for name, one in theta.items()}, local.fingerprint)
        result = local.train(number)
    own = {name: one for name, one in result.personal.items() if name.startswith(COPY)}
    assert len(own) == len(result.delta)
    plan = Plan("lesions", BUNDLE, strategy({"mode": "smooth"}).model_dump(mode="json"), TINY)
    assert set(own) <= set(plan.personal()) and not set(own) & set(plan.shared())
    # as the learner hands it over
    arrays = {name: np.ascontiguousarray(one.numpy()) for name, one in {**result.delta, **result.personal}.items()}
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 4, ROUND_KEY: 1, FINGERPRINT_KEY: local.fingerprint}
    handed = DXO(DataKind.WEIGHT_DIFF, data=arrays, meta=meta).to_shareable()
    passed = check_result(handed, "train", shared=plan.shared(), personal=plan.personal(), code="E19")
    sent = from_shareable(passed.shareable)
    assert passed.excluded == len(own) and set(sent.data) == set(plan.shared()) and sent.meta == meta
    for one in own.values():
        assert not any(np.array_equal(one.numpy(), array) for array in sent.data.values() if array.any())
    with pytest.raises(PFedSAMError, match="E20"):
        check_result(handed, "train", shared=plan.shared(), code="E20")


# the settings ---------------------------------------------------------------------------------------------------------


def test_a_strategy_without_it_is_told_as_before() -> None:
    assert "load" not in strategy(None).model_dump() and "load" not in strategy(None).model_dump_json()
    told = strategy({"mode": "binary"}).model_dump(mode="json")
    assert told["load"]["mode"] == "binary" and Strategy.of(told) == strategy({"mode": "binary"})


@pytest.mark.parametrize("name", ["soft_load", "soft_load_binary", "soft_load_learned"])
def test_its_rounds_are_no_other_strategys(name: str) -> None:
    found = find_strategy(name).checked()
    assert found.rounds_alone() is None and found.has_copy and found.remembers and found.rounds_are_personal
    assert find_strategy("fedavg_lora").checked().rounds_alone() is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"load": {"mode": "hard"}},
        {"load": {"share": 1.5}},
        {"load": {"share": True}},
        {"load": {"threshold": -0.1}},
        {"load": {"steps": 0}},
        {"load": {"rate": 0}},
        {"load": {"m": 1}},
        {"load": {}, "aggregation": "alternate"},
        {"load": {}, "phases": [{"name": "a", "trains": ["copy"], "experts": False}]},
        {"load": {}, "phases": [{"name": "a", "trains": ["shared"], "experts": True}]},
        {"load": {}, "final": [{"name": "a", "trains": ["personal"], "experts": True}]},
        {"load": {}, "final": [{"name": "a", "trains": ["copy"], "experts": False}], "serving": {}},
        {"load": {}, "shared": [], "personal": ["lora_a"]},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError, match="E16"):
        Strategy.of({"personal": [], **wrong})
