"""Warm-up without labels, the adversary of styles, and episodes: what defines each of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor
from torch.utils.data import DataLoader

from pfedsam.data.slices import EpochSampler, SliceDataset
from pfedsam.errors import PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, base_state, group_of, tensors
from pfedsam.training import episode
from pfedsam.training.alignment import Contrast, Reversed, StyleAdversary, contrast
from pfedsam.training.alignment_settings import Adversary, Episode, WarmUp
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.dropped import dropped
from pfedsam.training.episode import add_outer_gradient
from pfedsam.training.phase import Phase
from pfedsam.training.strategy import Strategy
from pfedsam.training.trainer import PhaseTrainer

SIDE = 64
ROLES = Roles(("lora_a", "lora_b", "decoder_subset"), ())
LOSS = DiceCELoss(sigmoid=True, batch=True)


def phase(**settings: Any) -> Phase:
    return Phase.of({"name": "train", "trains": ["shared"], "experts": False, "learning_rate": 1e-2, **settings})


@pytest.fixture(scope="module")
def built() -> SegmentAnything:
    return build_network("vit_test", SIDE)


def case(number: int, flipped: bool = False) -> dict[str, Tensor]:
    mask = torch.zeros(1, SIDE, SIDE, 4)
    mask[:, 8 + 6 * number : 36 + 6 * number, 16:40, 1:3] = 1
    image = torch.rand(1, SIDE, SIDE, 4, generator=torch.Generator().manual_seed(number)) * 0.4
    return {"image": image + 0.6 * mask, "label": mask.flip(1) if flipped else mask}


@pytest.fixture(scope="module")
def make(built: SegmentAnything) -> Callable[..., PhaseTrainer]:
    """Builds a trainer as a bundle does."""

    def trainer(flipped: bool = False) -> PhaseTrainer:
        network = copy.deepcopy(built)
        data = SliceDataset([case(number, flipped) for number in range(2)], lambda item: dict(item))
        found = PhaseTrainer(
            max_epochs=1,
            device=torch.device("cpu"),
            train_data_loader=DataLoader(data, batch_size=3, sampler=EpochSampler(data)),
            network=network,
            loss_function=LOSS,
            optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
            phase=phase().model_dump(),
            shared=list(ROLES.shared),
            personal=list(ROLES.personal),
        )
        found.base = {n: t.clone() for n, t in tensors(network).items() if group_of(n) in ROLES.shared}
        return found

    return trainer


def trained(trainer: PhaseTrainer, current: Phase, round_number: int = 2) -> dict[str, Tensor]:
    """The tensors after a phase."""
    trainer.set_phase(current, ROLES, round_number)
    trainer.run()
    return {name: tensor.clone() for name, tensor in tensors(trainer.network).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def unit(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1)


# warm-up --------------------------------------------------------------------------------------------------------------


def test_the_contrast_is_the_log_of_the_share_that_the_own_second_view_has() -> None:
    first, second = unit(0, 90), unit(0, 90)
    # cosines: 1 with the own view, 0 with the other image, -1 and 0 with a third one of the dictionary
    expected = (math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1) + math.exp(-1))) / 2
    found = contrast(first, second, [4, 5], [(6, unit(180)[0])], 1.0)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_an_earlier_view_of_the_same_image_is_no_other_image() -> None:
    first, second = unit(0), unit(20)
    assert float(contrast(first, second, [4], [(4, unit(0)[0])], 0.1)) == pytest.approx(0, abs=1e-6)
    assert float(contrast(first, second, [4], [(5, unit(0)[0])], 0.1)) > 0.5


def test_a_warm_up_needs_no_label_and_leaves_the_decoder_alone(make) -> None:
    start = {name: tensor.clone() for name, tensor in tensors(make().network).items()}
    warm = phase(warm_up={"rounds": 2})
    first, other = trained(make(), warm, 1), trained(make(flipped=True), warm, 1)
    assert same(first, other)
    assert not same(trained(make(), phase()), trained(make(flipped=True), phase()))
    moved = {group_of(name) for name, tensor in first.items() if not torch.equal(tensor, start[name])}
    assert "lora_b" in moved and "decoder_subset" not in moved


def test_after_the_warm_up_the_digits_are_those_of_a_phase_without(make) -> None:
    assert same(trained(make(), phase(warm_up={"rounds": 2}), 2), trained(make(), phase(), 2))


def test_alignment_keeps_the_embedding_near_the_base(make) -> None:
    def distance(weight: float) -> float:
        trainer = make()
        trained(trainer, phase(epochs=8, warm_up={"alignment": weight}), 0)
        images = torch.stack([trainer.data_loader.dataset[item]["image"] for item in range(3)])
        pooled = []
        for network in (trainer.network, make().network):
            with torch.no_grad():
                pooled.append(network.encode(network.trunk(images)).mean((-2, -1)))
        return float(1 - torch.cosine_similarity(*pooled).mean())

    assert distance(100.0) < 0.5 * distance(0.0)


def test_the_dictionary_has_an_end(built: SegmentAnything) -> None:
    settings = WarmUp(dictionary=3)
    learner = Contrast(copy.deepcopy(built), settings, {}, (0, 0), lambda: torch.autocast("cpu", enabled=False))
    features = built.trunk(torch.rand(2, 3, SIDE, SIDE))
    for step in range(3):
        assert learner(features, [2 * step, 2 * step + 1], step).isfinite()
    assert [item for item, _ in learner._others] == [3, 4, 5]


def test_what_is_dropped_follows_from_the_draw_and_the_mean_stays() -> None:
    features = torch.ones(50, 100)
    assert torch.equal(dropped(features, 0.0, (1, 2)), features)
    first = dropped(features, 0.3, (1, 2, 3))
    assert torch.equal(first, dropped(features, 0.3, (1, 2, 3)))
    assert not torch.equal(first, dropped(features, 0.3, (1, 2, 4)))
    assert float(first.mean()) == pytest.approx(1, abs=0.05) and float((first == 0).float().mean()) < 0.35


# adversary ------------------------------------------------------------------------------------------------------------


def test_the_gradient_comes_back_reversed() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    through = Reversed.apply(values, 0.25)
    assert torch.equal(through, values)
    (through * torch.tensor([3.0, -4.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-0.75, 1.0]


def test_without_weight_the_discriminator_learns_and_the_network_does_not_notice(make) -> None:
    trainer, plain = make(), make()
    current = phase(epochs=6, learning_rate=1e-5, adversary={"weight": 0.0, "learning_rate": 0.05})
    assert same(trained(trainer, current), trained(plain, phase(epochs=6, learning_rate=1e-5)))
    extra = np.array(trainer.report.losses) - np.array(plain.report.losses)
    assert extra[0] > 0.4 and extra[-3:].mean() < 0.8 * extra[:3].mean()


def test_a_trained_encoder_hides_the_style(make) -> None:
    """The discriminator of a network that is trained against it tells less."""

    def told(weight: float) -> float:
        network = copy.deepcopy(make().network)
        for name, tensor in tensors(network).items():
            tensor.requires_grad_(group_of(name) in ("lora_a", "lora_b"))
        images = torch.stack([make().data_loader.dataset[item]["image"] for item in range(4)])
        settings = Adversary(weight=weight, learning_rate=0.02)
        opponent = StyleAdversary(network, settings, (0, 0), lambda: torch.autocast("cpu", enabled=False))
        trained = [one for one in network.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        losses = []
        for step in range(40):
            optimizer.zero_grad()
            loss = opponent(network.trunk(images), images, step)
            loss.backward()
            optimizer.step()
            opponent.step()
            losses.append(float(loss.detach()))
        return float(np.mean(losses[-10:]))

    assert told(5.0) > told(0.0) + 0.05


# episodes -------------------------------------------------------------------------------------------------------------


def test_the_outer_gradient_is_taken_where_the_inner_step_leads_and_nothing_moves(built: SegmentAnything) -> None:
    network = copy.deepcopy(built).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(group_of(name) == "decoder_subset")
    parameters = [one for one in network.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in parameters]
    item = case(0)
    label = item["label"][None, ..., 1].expand(2, -1, -1, -1)
    features = network.trunk(item["image"][None, ..., 1].expand(2, 3, -1, -1))

    def gradients() -> list[Tensor]:
        network.zero_grad()
        LOSS(network.head(features), label).backward()
        return [one.grad.clone() for one in parameters if one.grad is not None]

    inner = gradients()
    with torch.no_grad():
        for one, gradient in zip(parameters, inner, strict=True):
            one.sub_(0.05 * gradient)
    outer = gradients()
    with torch.no_grad():
        for one, value in zip(parameters, before, strict=True):
            one.copy_(value)
    gradients()
    settings, plain = Episode(rate=0.05, weight=0.5), lambda: torch.autocast("cpu", enabled=False)
    # two images of one style: the loss outside is the same function
    add_outer_gradient(network, parameters, settings, LOSS, features, label, (0, 0, 0), plain)
    assert all(torch.equal(one, value) for one, value in zip(parameters, before, strict=True))
    for one, a, b in zip(parameters, inner, outer, strict=True):
        torch.testing.assert_close(one.grad, a + 0.5 * b, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(inner, outer, strict=True))
    gradients()
    add_outer_gradient(network, parameters, settings, LOSS, features[:1], label[:1], (0, 0, 0), plain)
    assert all(torch.equal(one.grad, a) for one, a in zip(parameters, inner, strict=True)), (
        "one image has no other style"
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_an_image_takes_the_style_of_another_and_never_its_own(
    built: SegmentAnything, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[np.ndarray] = []

    def restyled(network: SegmentAnything, features: Tensor, number: int, partners: np.ndarray) -> Tensor:
        found.append(partners)
        return features

    monkeypatch.setattr(episode, "restyled_features", restyled)
    features, label = built.trunk(torch.rand(count, 3, SIDE, SIDE)), torch.zeros(count, 1, SIDE, SIDE)
    for step in range(10):
        add_outer_gradient(
            built, [], Episode(), LOSS, features, label, (0, 0, step), lambda: torch.autocast("cpu", enabled=False)
        )
    assert len(found) == 10
    assert all(sorted(one) == list(range(count)) and (one != np.arange(count)).all() for one in found)


def test_an_episode_without_weight_has_the_digits_of_none_and_one_with_weight_has_others(make) -> None:
    plain = trained(make(), phase(epochs=2))
    assert same(trained(make(), phase(epochs=2, episode={"weight": 0.0})), plain)
    once, again = (trained(make(), phase(epochs=2, episode={})) for _ in range(2))
    assert same(once, again) and not same(once, plain)


# settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"warm_up": {"rounds": 0}},
        {"warm_up": {"temperature": 0}},
        {"adversary": {"hidden": 0}},
        {"episode": {"rate": 0}},
        {"episode": {"second_order": True}},
        {"episode": {}, "mixup": {}},
    ],
    ids=str,
)
def test_a_setting_that_is_none_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError) as caught:
        phase(**settings)
    assert caught.value.code == "E16"


def test_a_warm_up_wants_cases_without_a_label_and_the_base() -> None:
    warm, plain = (find_strategy(name).checked() for name in ("warm_up", "style_adversary"))
    assert warm.learns_from_unlabelled and warm.needs_unshared
    assert not plain.learns_from_unlabelled and not plain.needs_unshared


def test_a_warm_up_is_near_the_base_also_where_a_site_keeps_lora(make) -> None:
    trainer = make()
    names = {name for name, tensor in tensors(trainer.network).items() if group_of(name) in ("lora_a", "lora_b")}
    assert names and names <= set(base_state(trainer.network, Roles((), ("lora_a", "lora_b"))))


@pytest.mark.parametrize("where", ["final", "alone"])
def test_a_warm_up_behind_the_last_round_is_refused(where: str) -> None:
    late = {"name": "late", "trains": ["copy"], "experts": False, "warm_up": {}}
    plain = {**late, "warm_up": None}
    serving = {"serving": {"alone": late}} if where == "alone" else {}
    with pytest.raises(PFedSAMError, match=r"E16.*late"):
        Strategy.of({"personal": [], "final": [late if where == "final" else plain], **serving})


@pytest.mark.parametrize("key", ["warm_up", "adversary"])
def test_what_aligns_the_encoder_trains_something_in_it(make, key: str) -> None:
    with pytest.raises(PFedSAMError, match=rf"E32.*{key}"):
        make().set_phase(phase(**{key: {}}), Roles(("decoder_subset",), ()), 0)


@pytest.mark.parametrize("settings", [{"adversary": {}}, {"episode": {}}, {"warm_up": {}}], ids=str)
def test_gates_count_the_sites_own_images_once(settings: dict[str, Any]) -> None:
    network = build_network("vit_test", SIDE, experts=2)
    network.set_experts(True)
    network.train()
    features, label = network.trunk(torch.rand(2, 3, SIDE, SIDE)), torch.zeros(2, 1, SIDE, SIDE)
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    one = phase(**settings)
    if one.adversary:
        StyleAdversary(network, one.adversary, (0, 0), autocast)(features, torch.rand(2, 3, SIDE, SIDE), 0)
    elif one.warm_up:
        Contrast(network, one.warm_up, {}, (0, 0), autocast)(features, [0, 1], 0)
    else:
        add_outer_gradient(network, [], one.episode, LOSS, features, label, (0, 0, 0), autocast)
    assert {layer._seen for layer in network.expert_layers().values()} == {0}
    network.head(features)
    assert all(layer._seen > 0 for layer in network.expert_layers().values())


def test_a_warm_up_draws_cases_without_a_label(tmp_path: Path, make) -> None:
    trainer = make()
    trainer.set_phase(phase(warm_up={"share": 2.0}), ROLES, 1)
    assert trainer._unlabelled_share() == 2.0
    trainer.set_phase(phase(warm_up={"share": 2.0}), ROLES, 2)
    assert trainer._unlabelled_share() == 0.0
