"""LoRA on q and v of a fused projection: k never changes, in the layout of each backbone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pfedsam.networks.backbones import get_backbone
from pfedsam.networks.lora import Layout, LoRA, QVLoRA, merged
from pfedsam.networks.sam import build_network

torch.set_num_threads(1)
SIDE = {"vit_test": 32, "lite_medsam": 32}


def split(fused: Tensor, heads: int, backbone: str) -> Tensor:
    """`(N, 3 * dim)` to q, k, v `(3, N, heads, head_dim)`, as the attention of each backbone splits it."""
    if backbone == "vit_test":  # segment_anything: qkv(x).reshape(B, H * W, 3, heads, -1)
        return fused.view(len(fused), 3, heads, -1).transpose(0, 1)
    return fused.view(len(fused), heads, 3, -1).permute(2, 0, 1, 3)  # TinyViT: view(B, N, heads, 3 * head_dim)


@pytest.mark.parametrize("backbone", SIDE)
@torch.no_grad()
def test_lora_changes_q_and_v_of_every_head_and_k_of_none(backbone):
    network = build_network(backbone, SIDE[backbone])
    layers = [block.attn for block in network.image_encoder.adaptable_blocks() if isinstance(block.attn.qkv, QVLoRA)]
    assert len(layers) == get_backbone(backbone).adapted_blocks
    for attention in layers:
        layer = attention.qkv
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        before = split(F.linear(x, layer.weight, layer.bias), attention.num_heads, backbone)
        assert torch.equal(split(layer(x), attention.num_heads, backbone), before)
        layer.lora_b.normal_(generator=torch.Generator().manual_seed(1))
        q, k, v = split(layer(x), attention.num_heads, backbone)
        assert torch.equal(k, before[1])
        for changed, old in ((q, before[0]), (v, before[2])):
            assert (changed != old).any(dim=-1).all(), "a head of q or v is unchanged"


@pytest.mark.parametrize("factor", [0, 1], ids=["q", "v"])
@pytest.mark.parametrize("layout", ["blocks", "per_head"])
@torch.no_grad()
def test_each_factor_moves_its_own_part_only(layout: Layout, factor):
    layer = QVLoRA(nn.Linear(8, 24), heads=2, layout=layout)
    layer.lora_b[factor].normal_()
    x = torch.randn(5, 8)
    backbone = "vit_test" if layout == "blocks" else "lite_medsam"
    before, after = (split(y, 2, backbone) for y in (F.linear(x, layer.weight, layer.bias), layer(x)))
    moved = [not torch.equal(after[i], before[i]) for i in range(3)]
    assert moved == [factor == 0, False, factor == 1]


@pytest.mark.parametrize("layout", ["blocks", "per_head"])
@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_layer_equals_a_dense_projection_with_the_product_added(layout: Layout, alpha, bias):
    dim, rank, heads = 12, 3, 2
    linear = nn.Linear(dim, 3 * dim, bias=bias)
    layer = QVLoRA(linear, heads, layout, rank, alpha)
    layer.lora_b.normal_()
    scale = 1.0 if alpha is None else 2.0
    dense = linear.weight.clone()
    for part, factor in ((0, 0), (2, 1)):
        delta = scale * layer.lora_b[factor] @ layer.lora_a[factor]
        for head in range(heads):
            for i in range(dim // heads):
                row = part * dim + head * (dim // heads) + i
                if layout == "per_head":
                    row = head * 3 * (dim // heads) + part * (dim // heads) + i
                dense[row] += delta[head * (dim // heads) + i]
    x = torch.randn(2, 4, dim)
    assert torch.allclose(layer(x), F.linear(x, dense, linear.bias), atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear_layer_equals_a_dense_one_with_the_product_added(alpha, bias):
    linear = nn.Linear(12, 7, bias=bias)
    layer = LoRA(linear, 3, alpha)
    x = torch.randn(2, 4, 12)
    assert torch.equal(layer(x), linear(x))
    layer.lora_b.normal_()
    dense = linear.weight + (1.0 if alpha is None else 2.0) * layer.lora_b @ layer.lora_a
    assert torch.allclose(layer(x), F.linear(x, dense, linear.bias), atol=1e-5)


#: Layers of a block by place, as each backbone names them.
PLACES = {
    "vit_test": {"qv": {"attn.qkv"}, "projection": {"attn.proj"}, "mlp": {"mlp.lin1", "mlp.lin2"}},
    "lite_medsam": {"qv": {"attn.qkv"}, "projection": {"attn.proj"}, "mlp": {"mlp.fc1", "mlp.fc2"}},
}


@pytest.mark.parametrize("place", PLACES["vit_test"])
@pytest.mark.parametrize("backbone", SIDE)
def test_lora_is_where_it_was_asked_for_in_adapted_blocks_only(backbone, place):
    network = build_network(backbone, SIDE[backbone], adapted_blocks=1, lora_places=[place])
    *others, last = network.image_encoder.adaptable_blocks()
    found = {name for name, layer in last.named_modules() if isinstance(layer, (LoRA, QVLoRA))}
    assert found == PLACES[backbone][place]
    assert not any(name.endswith("lora_a") for block in others for name, _ in block.named_parameters())


def test_layer_takes_the_projection_over_and_keeps_its_names():
    linear = nn.Linear(8, 24)
    layer = QVLoRA(linear, heads=2, layout="blocks")
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}
    assert layer.lora_a.any() and not layer.lora_b.any()


def test_gradient_reaches_b_at_once_and_a_after_it():
    layer = QVLoRA(nn.Linear(8, 24), heads=2, layout="blocks")
    x = torch.randn(5, 8)
    layer(x).square().sum().backward()
    assert layer.lora_b.grad is not None and layer.lora_b.grad.any()
    assert layer.lora_a.grad is not None and not layer.lora_a.grad.any()
    nn.init.ones_(layer.lora_b)
    layer(x).square().sum().backward()
    assert layer.lora_a.grad.any()


@pytest.mark.parametrize("backbone", SIDE)
@pytest.mark.parametrize("experts", [True, False])
@torch.no_grad()
def test_a_merged_copy_computes_the_same_without_updates_and_leaves_the_network(backbone: str, experts: bool) -> None:
    places = ("qv", "projection", "mlp")
    network = build_network(backbone, SIDE[backbone], lora_places=places, decoder_rank=2)
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_b" in name or "experts" in name:
            parameter.normal_(0, 0.1, generator=random)
    network.set_experts(experts)
    images = torch.rand(2, 3, SIDE[backbone], SIDE[backbone], generator=random)
    before = network(images)
    alone = merged(network)
    assert not [layer for layer in alone.modules() if isinstance(layer, (LoRA, QVLoRA))]
    torch.testing.assert_close(alone(images), before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert torch.equal(network(images), before)
