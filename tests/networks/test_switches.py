"""What holds for every backbone and every switch: a no-op at the start, batches, the door, gradients, the ceiling."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from pfedsam.errors import PFedSAMError
from pfedsam.networks.adaptation import ADAPTATION
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import (
    Roles,
    group_of,
    load_personal_state,
    load_shared_state,
    partition,
    personal_state,
    shared_state,
    tensors,
)

torch.set_num_threads(1)
SIDE = {"vit_test": 64, "lite_medsam": 32}
ROLES = Roles()

#: One for each switch, and some of them together.
SWITCHES = {
    "default": {},
    "all_blocks": {"adapted_blocks": "all"},
    "no_block": {"adapted_blocks": 0},
    "rank_2": {"lora_rank": 2},
    "lora_in_mlps_only": {"lora_places": ["mlp"]},
    "decoder_lora": {"decoder_rank": 2},
    "one_expert": {"experts": 1},
    "eight_experts": {"experts": 8, "bottleneck": 4},
    "token_gate": {"gate": "token"},
    "top_1": {"top_k": 1},
    "top_2_token": {"top_k": 2, "gate": "token"},
    "half_scale": {"expert_scale": 0.5},
    "neck": {"expert_places": ["neck"]},
    "decoder": {"expert_places": ["decoder"]},
    "neck_of_a_frozen_encoder": {"expert_places": ["neck"], "adapted_blocks": 0},
    "everywhere": {
        "lora_places": ["qv", "projection", "mlp"],
        "expert_places": ["encoder", "neck", "decoder"],
        "decoder_rank": 2,
        "top_k": 2,
        "gate": "token",
    },
    "two_classes": {"classes": 2},
    "six_classes": {"classes": 6},
}
CASES = [("vit_test", switch) for switch in SWITCHES] + [
    ("lite_medsam", switch) for switch in ("default", "top_2_token", "everywhere", "six_classes")
]
each = pytest.mark.parametrize(("backbone", "switch"), CASES, ids="-".join)


@functools.cache
def build(backbone: str, switch: str) -> SegmentAnything:
    """Tests leave it as it is."""
    return build_network(backbone, SIDE[backbone], **SWITCHES[switch])


@functools.cache
def trained(backbone: str, switch: str) -> SegmentAnything:
    """With random values in everything that a federation trains. Tests leave it as it is."""
    network = build_network(backbone, SIDE[backbone], **SWITCHES[switch])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in tensors(network).items():
            if group_of(name) in ("lora_b", "experts"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return network


def images(network: SegmentAnything, number: int = 1) -> torch.Tensor:
    side = network.image_size
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0))


def bare(backbone: str, switch: str) -> SegmentAnything:
    settings = {key: value for key, value in SWITCHES[switch].items() if key == "classes"}
    return build_network(backbone, SIDE[backbone], lora_rank=0, experts=0, **settings)


@each
@torch.no_grad()
def test_start_is_the_bare_backbone_bit_for_bit(backbone, switch):
    network = build(backbone, switch)
    x = images(network)
    expected = bare(backbone, switch)(x)
    for on in (True, False):
        with network.experts(on):
            assert torch.equal(network(x), expected)


@each
@torch.no_grad()
def test_batch_equals_its_images(backbone, switch):
    network = trained(backbone, switch)
    x = images(network, 3)
    together = network(x)
    assert together.shape == (3, network.classes, *x.shape[2:])
    singles = torch.cat([network(image) for image in x.split(1)])
    torch.testing.assert_close(together, singles, rtol=1e-4, atol=1e-4)


@each
@torch.no_grad()
def test_trunk_and_head_make_the_network_and_the_trunk_holds_nothing_trained(backbone, switch):
    network, start = trained(backbone, switch), build(backbone, switch)
    x = images(network)
    assert torch.equal(network.head(network.trunk(x)), network(x))
    assert torch.equal(network.trunk(x), start.trunk(x))


@each
def test_state_goes_out_and_in_through_the_door_and_nothing_personal_is_shared(backbone, switch):
    source = trained(backbone, switch)
    target = build_network(backbone, SIDE[backbone], seed=5, **SWITCHES[switch])
    shared, personal = shared_state(source, ROLES), personal_state(source, ROLES)
    assert bool(personal) == bool(source.expert_layers())
    assert not any("experts" in name for name in shared) and all("experts" in name for name in personal)
    load_shared_state(target, ROLES, shared)
    load_personal_state(target, ROLES, personal)
    x = images(source)
    with torch.no_grad():
        if backbone == "lite_medsam":  # vit_test's base weights come from the seed
            assert torch.equal(target(x), source(x))
    assert {**shared_state(target, ROLES), **personal_state(target, ROLES)}.keys() == {**shared, **personal}.keys()
    for name, tensor in {**shared, **personal}.items():
        assert torch.equal(tensors(target)[name], tensor)


@each
def test_every_tensor_has_exactly_one_role(backbone, switch):
    network = build(backbone, switch)
    roles = partition(network, ROLES)
    assert set(roles) == set(network.state_dict())
    assert all(roles[name] == "personal" for name in roles if "experts" in name)


@each
def test_gradient_reaches_all_that_is_trained(backbone, switch):
    network = trained(backbone, switch)
    network.train()
    try:
        for seed in range(2):
            x = torch.rand(4, 3, *[network.image_size] * 2, generator=torch.Generator().manual_seed(seed))
            network(x).square().mean().backward()
        found = {name: p.grad is not None and bool(p.grad.any()) for name, p in network.named_parameters()}
    finally:
        network.zero_grad(set_to_none=True)
        network.eval()
    groups = {"lora_a", "lora_b", "decoder_subset", "experts"}
    wanted = {name for name in found if group_of(name) in groups}
    # of sparse mixtures an expert may have had no image yet, and one that is alone has a gate that is always 1
    loose = "experts" if SWITCHES[switch].get("top_k") or SWITCHES[switch].get("experts") == 1 else None
    assert not [name for name in wanted if not found[name] and group_of(name) != loose]


@each
def test_fingerprint_tells_switches_apart(backbone, switch):
    ours = build(backbone, switch).base_fingerprint
    others = {other: build(backbone, other).base_fingerprint for b, other in CASES if b == backbone and other != switch}
    assert ours and ours not in others.values()


@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_loading_the_base_before_or_after_the_surgery_gives_the_same_network(switch):
    from pfedsam.networks.adaptation import adapt
    from pfedsam.networks.loading import load_base

    settings = {key: value for key, value in SWITCHES[switch].items() if key != "classes"}
    classes = SWITCHES[switch].get("classes", 1)
    generator = torch.Generator().manual_seed(1)
    whole = SegmentAnything("vit_test", 64, 4).state_dict()
    state = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in whole.items()}
    outputs = []
    for first in ("load", "adapt"):
        network = SegmentAnything("vit_test", 64, classes)
        for step in (first, {"load": "adapt", "adapt": "load"}[first]):
            if step == "load":
                load_base(network, state, "random")
            else:
                adapt(network, "blocks", **settings)
        outputs.append(network.eval()(images(network)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("switch", ["default", "everywhere", "top_1"])
def test_checkpointing_changes_neither_outputs_nor_gradients(switch):
    gradients = []
    for checkpointing in (False, True):
        network = build_network(
            "vit_test", 64, checkpointing=checkpointing, **{"adapted_blocks": 3, **SWITCHES[switch]}
        )
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if group_of(name) in ("lora_b", "experts"):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
        network.train()
        output = network(images(network, 2))
        output.square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpointing_is_not_part_of_the_fingerprint():
    one, other = (build_network("vit_test", 64, checkpointing=on) for on in (False, True))
    assert one.base_fingerprint == other.base_fingerprint


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("gate", ["image", "token"])
@torch.no_grad()
def test_exactly_k_gates_count_and_sum_to_one_but_for_top_1(gate, top_k):
    network = build_network("vit_test", 64, gate=gate, top_k=top_k)
    layer = next(iter(network.expert_layers().values()))
    gates = layer.gates(torch.randn(5, 4, 4, 64, generator=torch.Generator().manual_seed(0)))
    assert ((gates > 0).sum(-1) == top_k).all()
    if top_k > 1:
        torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))
    else:  # the largest probability as it is, so that the gate has a gradient
        assert (gates.sum(-1) < 1).all()


@torch.no_grad()
def test_balance_loss_is_one_when_experts_are_used_alike_and_larger_when_one_takes_all():
    from pfedsam.networks.moe import load_balance

    even = torch.eye(4)
    assert float(load_balance(torch.full((4, 4), 0.25), even)) == pytest.approx(1)
    one = torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 4)
    assert float(load_balance(one, (one > 0.5) * one)) == pytest.approx(4 * 0.97)


def test_balance_loss_is_there_with_top_k_only_and_moves_the_gate():
    assert (dense := build_network("vit_test", 64)).train()(images(dense)) is not None and dense.balance_loss() is None
    network = build_network("vit_test", 64, top_k=1).train()
    network(images(network, 4))
    loss = network.balance_loss()
    assert loss is not None and loss.ndim == 0
    loss.backward()
    assert all(layer.gate.weight.grad.any() for layer in network.expert_layers().values())
    with network.experts(False):
        assert network.balance_loss() is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_k", 5),
        ("top_k", -1),
        ("decoder_rank", -1),
        ("lora_places", ["attic"]),
        ("lora_places", "qv"),
        ("lora_places", ["mlp", "mlp"]),
        ("expert_places", ["attic"]),
        ("expert_places", "encoder"),
        ("expert_places", ["neck", "neck"]),
        ("gate", "voxel"),
        ("bottleneck", 0),
    ],
)
def test_impossible_setting_is_named(setting, value):
    with pytest.raises(PFedSAMError, match=rf"E16.*{setting}.*{re.escape(str(value))}"):
        build_network("vit_test", 64, **{setting: value})


def test_every_setting_of_the_surgery_has_a_case():
    covered = {key for settings in SWITCHES.values() for key in settings}
    assert covered >= set(ADAPTATION)


def test_trained_encoder_gets_a_gradient_everywhere():
    network = build_network("vit_test", 64)
    network.frozen_trunk = False
    network.train()(images(network)).square().mean().backward()
    encoder = [p for name, p in network.named_parameters() if group_of(name) == "encoder"]
    assert encoder and all(p.grad is not None for p in encoder)
