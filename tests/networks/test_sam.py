"""The network: a no-op at the start, experts that can be switched, batches, classes, trunk and head."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, group_of, manifest, tensors

torch.set_num_threads(1)
SIDE = {"vit_test": 64, "lite_medsam": 32}
ROLES = Roles()


@functools.cache
def built(backbone: str, **settings) -> SegmentAnything:
    return build_network(backbone, SIDE[backbone], **settings)


def build(backbone: str, **settings) -> SegmentAnything:
    return copy.deepcopy(built(backbone, **settings))


def images(network: SegmentAnything, number: int = 1, seed: int = 0) -> torch.Tensor:
    side = network.image_size
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill(network: SegmentAnything, *groups: str, scale: float = 0.1) -> SegmentAnything:
    """Random values in all tensors of some groups."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors(network).items():
        if group_of(name) in groups:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return network


@pytest.fixture(scope="module", params=SIDE)
def trained(request) -> SegmentAnything:
    """A network whose LoRA and experts do something. Tests leave it as it is."""
    return fill(build(request.param), "lora_b", "experts")


# a no-op at the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "gate"), [("vit_test", "image"), ("vit_test", "token"), ("lite_medsam", "image")])
@torch.no_grad()
def test_adapters_change_no_bit_of_the_output_at_the_start(backbone, gate):
    bare = build(backbone, lora_rank=0, experts=0)
    adapted = build(backbone, gate=gate, adapted_blocks="all" if backbone == "vit_test" else 2)
    assert adapted.expert_layers() and not bare.expert_layers()
    x = images(bare)
    expected = bare(x)
    for on in (True, False):
        adapted.set_experts(on)
        assert torch.equal(adapted(x), expected)


@torch.no_grad()
def test_experts_switched_off_give_the_global_model_bit_for_bit(trained):
    global_model = build(trained_name(trained))
    for name, tensor in tensors(global_model).items():
        if group_of(name) == "experts":
            tensor.zero_()
        else:
            tensor.copy_(tensors(trained)[name])
    x = images(trained)
    expected = global_model(x)
    assert not torch.allclose(trained(x), expected)
    with trained.experts(False):
        assert torch.equal(trained(x), expected)


def trained_name(network: SegmentAnything) -> str:
    return next(name for name, side in SIDE.items() if side == network.image_size)


@torch.no_grad()
def test_state_of_the_experts_is_restored_also_after_an_error(trained):
    x = images(trained)
    before = trained(x)
    with trained.experts(False), trained.experts(True):
        assert torch.equal(trained(x), before)
    with pytest.raises(KeyError), trained.experts(False):
        raise KeyError
    assert all(layer.enabled for layer in trained.expert_layers().values())
    assert torch.equal(trained(x), before)


def test_layers_with_different_states_are_restored_one_by_one():
    network = build("vit_test")
    first, second = network.expert_layers().values()
    second.enabled = False
    with network.experts(True):
        assert first.enabled and second.enabled
    assert first.enabled and not second.enabled


@pytest.mark.parametrize("number", [0, 1, 3, "all"])
def test_only_the_last_blocks_are_adapted(number):
    network = build("vit_test", adapted_blocks=number)
    count = 3 if number == "all" else number
    expected = {f"image_encoder.blocks.{i}.mlp.experts" for i in range(3 - count, 3)}
    assert set(network.expert_layers()) == expected
    lora = {name for name in tensors(network) if group_of(name) == "lora_a"}
    assert lora == {f"image_encoder.blocks.{i}.attn.qkv.lora_a" for i in range(3 - count, 3)}


# batches and classes --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_batch_equals_its_images_one_by_one(trained):
    x = images(trained, 3)
    singles = torch.cat([trained(image) for image in x.split(1)])
    assert torch.allclose(trained(x), singles, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backbone", "classes"), [("vit_test", 2), ("vit_test", 5), ("lite_medsam", 5)])
@torch.no_grad()
def test_batch_equals_its_images_one_by_one_with_several_classes(backbone, classes):
    network = fill(build(backbone, classes=classes), "lora_b", "experts")
    x = images(network, 3)
    together = network(x)
    assert together.shape == (3, classes, SIDE[backbone], SIDE[backbone])
    assert torch.allclose(together, torch.cat([network(image) for image in x.split(1)]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[:, 0], together[:, 1])
    if classes == 5:  # more than SAM's four tokens: the fifth starts as the first
        assert torch.allclose(together[:, 4], together[:, 0], rtol=1e-5, atol=1e-5)


# trunk and head -------------------------------------------------------------------------------------------------------


def test_head_of_trunk_is_forward(trained):
    x = images(trained, 2)
    features = trained.trunk(x)
    assert not features.requires_grad
    assert torch.equal(trained.head(features), trained(x))


@pytest.mark.parametrize("number", [0, 1, 2, "all"])
@torch.no_grad()
def test_nothing_that_is_adapted_belongs_to_the_trunk(number):
    network = build("vit_test", adapted_blocks=number)
    x = images(network)
    features = network.trunk(x)
    fill(network, "lora_a", "lora_b", "experts", "decoder_subset")
    assert torch.equal(network.trunk(x), features)
    assert torch.equal(network.head(features), network(x))


@pytest.mark.parametrize("backbone", SIDE)
def test_gradient_reaches_every_lora_and_decoder_subset_tensor(backbone):
    network = fill(build(backbone), "lora_b", "experts").train()
    network(images(network)).square().mean().backward()
    missing = [
        name
        for name, parameter in network.named_parameters()
        if group_of(name) in {"lora_a", "lora_b", "decoder_subset", "experts"}
        and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not missing


@pytest.mark.parametrize("backbone", SIDE)
def test_running_statistics_never_move_in_training(backbone):
    network = build(backbone).train()
    assert network.training and all(layer.training for layer in network.expert_layers().values())
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(2):
        network.train()
        network(images(network, seed=step)).square().mean().backward()
        optimizer.step()
    assert (backbone == "vit_test") != any("running_mean" in name for name in buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


@torch.no_grad()
def test_training_mode_does_not_change_the_output(trained):
    x = images(trained, 2)
    expected = trained(x)
    try:
        assert torch.equal(trained.train()(x), expected)
    finally:
        trained.eval()


@pytest.mark.parametrize("experts", [True, False])
@torch.no_grad()
def test_bfloat16_probabilities_are_within_five_hundredths_of_float32(experts):
    network = fill(build("vit_test", classes=2), "lora_b", "experts")
    x = images(network, 4)
    with network.experts(experts):
        exact = network(x).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = network(x).float().sigmoid()
            split = network.head(network.trunk(x)).float().sigmoid()
    assert 0 < (reduced - exact).abs().max() < 0.05
    assert torch.equal(reduced, split)


# how it is built ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SIDE)
def test_network_on_the_meta_device_has_the_same_manifest(backbone):
    real = build(backbone, classes=5)
    with torch.device("meta"):
        meta = build_network(backbone, SIDE[backbone], classes=5)
    assert all(tensor.is_meta for tensor in tensors(meta).values())
    for role in ("shared", "personal", "frozen"):
        expected = manifest(real, ROLES, role)
        assert expected and manifest(meta, ROLES, role) == expected
        assert list(manifest(meta, ROLES, role)) == list(expected)
    assert meta.base_fingerprint is None


def test_same_seed_builds_the_same_network_and_another_seed_other_adapters():
    one, same, other = (build_network("vit_test", 64, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(tensor, tensors(same)[name]) for name, tensor in tensors(one).items())
    for group in ("lora_a", "experts"):
        names = [n for n in tensors(one) if group_of(n) == group and tensors(one)[n].any()]
        assert names and not any(torch.equal(tensors(one)[n], tensors(other)[n]) for n in names)


def test_building_does_not_move_the_global_random_state():
    before = torch.get_rng_state()
    build_network("vit_test", 64)
    assert torch.equal(torch.get_rng_state(), before)
